"""Clients that people already have, against a served artifact.

usage: clients.py GPTQ MODEL   (needs huggingface_hub and openai)
"""

import json
import sys
import urllib.request

import huggingface_hub
import openai

from server import served

PROMPT = "The river"
MESSAGES = [{"role": "user", "content": "Tell me about the river."}]


def hugging_face(url):
    client = huggingface_hub.InferenceClient(url)
    plain = client.text_generation(PROMPT, max_new_tokens=12)
    assert isinstance(plain, str) and plain, plain
    assert "".join(client.text_generation(PROMPT, max_new_tokens=12, stream=True)) == plain
    details = client.text_generation(PROMPT, max_new_tokens=12, details=True)
    assert details.generated_text == plain and details.details.generated_tokens == 12, details
    assert all(token.logprob <= 0 for token in details.details.tokens), details
    prompt = client.text_generation(PROMPT, max_new_tokens=1, details=True, decoder_input_details=True).details.prefill
    assert "".join(token.text for token in prompt) == PROMPT and all(token.logprob < 0 for token in prompt[1:]), prompt
    last = list(client.text_generation(PROMPT, max_new_tokens=12, stream=True, details=True))[-1]
    assert last.generated_text == plain and last.details.finish_reason == "length", last
    sampled = dict(max_new_tokens=12, do_sample=True, temperature=0.8, top_k=40, top_p=0.9, seed=7)
    assert client.text_generation(PROMPT, **sampled) == client.text_generation(PROMPT, **sampled)
    chat = client.chat_completion(MESSAGES, max_tokens=8, temperature=0)
    text = chat.choices[0].message.content
    assert chat.usage.completion_tokens <= 8 and text, chat
    stream = client.chat_completion(MESSAGES, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == text


def open_ai(url):
    client = openai.OpenAI(base_url=url + "/v1", api_key="-", max_retries=0)
    assert [model.object for model in client.models.list()] == ["model"]
    ask = lambda **more: client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=8, temperature=0, **more)
    answer = ask(n=2, logprobs=True, top_logprobs=2)
    first, second = answer.choices
    assert first.message.content == second.message.content and first.finish_reason == "length", answer
    assert first.logprobs.content[0].logprob == first.logprobs.content[0].top_logprobs[0].logprob, answer
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == first.message.content
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens // 2, chunks[-1]
    whole = client.completions.create(model="m", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=1)
    text = whole.choices[0].text
    assert len(whole.choices[0].logprobs.tokens) == 12, whole
    echoed = client.completions.create(model="m", prompt=PROMPT, max_tokens=1, temperature=0, logprobs=1, echo=True).choices[0]
    assert echoed.logprobs.token_logprobs[0] is None and echoed.text[echoed.logprobs.text_offset[-1] :] in whole.choices[0].text, echoed
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    for given in (stop, ["never said", stop]):
        cut = client.completions.create(model="m", prompt=PROMPT, max_tokens=12, temperature=0, stop=given)
        assert cut.choices[0].text == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop", cut
    both = client.completions.create(model="m", prompt=[PROMPT, PROMPT], max_tokens=12, temperature=0)
    assert [choice.text for choice in both.choices] == [text, text], both

    expect(openai.UnprocessableEntityError, lambda: ask(presence_penalty=9.0))
    expect(openai.UnprocessableEntityError, lambda: client.completions.create(model="m", prompt=PROMPT * 9000))
    expect(openai.NotFoundError, lambda: client.embeddings.create(model="m", input="x"))
    hurried = client.with_options(timeout=0.001)
    expect(openai.APITimeoutError, lambda: hurried.completions.create(model="m", prompt=PROMPT, max_tokens=200))
    assert ask().choices[0].message.content == first.message.content, "the server goes on after a client that left"


def guarded(url):
    wrong = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
    expect(openai.AuthenticationError, lambda: wrong.completions.create(model="m", prompt=PROMPT))
    right = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0)
    assert right.completions.create(model="m", prompt=PROMPT, max_tokens=2).choices[0].text
    assert huggingface_hub.InferenceClient(url, token="secret").text_generation(PROMPT, max_new_tokens=2)


def crowded(url):
    """One place: who comes while it is taken is told to come again."""
    client = openai.OpenAI(base_url=url + "/v1", api_key="-", max_retries=0)
    stream = client.completions.create(model="m", prompt=PROMPT, max_tokens=400, stream=True)
    next(iter(stream))
    refused = expect(openai.RateLimitError, lambda: client.completions.create(model="m", prompt=PROMPT, max_tokens=2))
    assert int(refused.response.headers["retry-after"]) >= 1, refused.response.headers
    stream.close()


def expect(error, call):
    try:
        call()
    except error as raised:
        return raised
    raise AssertionError(f"{error.__name__} was expected")


# How the model cards have text-generation-inference started, and how they ask it.
CARD_FLAGS = "--quantize gptq --max-input-length 3696 --max-total-tokens 4096 --max-batch-prefill-tokens 4096".split()
CARD_PARAMETERS = dict(max_new_tokens=128, do_sample=True, temperature=0.7, top_p=0.95, top_k=40, repetition_penalty=1.1)


def card_snippet(url):
    """The request of the model cards, as Python's client and as curl sends it."""
    answer = huggingface_hub.InferenceClient(url).text_generation(PROMPT, **CARD_PARAMETERS)
    assert answer and not answer.startswith(PROMPT), answer
    body = json.dumps({"inputs": PROMPT, "parameters": CARD_PARAMETERS}).encode()
    request = urllib.request.Request(url + "/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["generated_text"]


def main():
    program, model = sys.argv[1:]
    with served(program, model, *CARD_FLAGS) as url:
        for check in (card_snippet, hugging_face, open_ai):
            check(url)
            print(check.__name__, "ok")
    with served(program, model, "--api-key", "secret") as url:
        guarded(url)
        print("guarded ok")
    with served(program, model, "--max-concurrent-requests", "1") as url:
        crowded(url)
        print("crowded ok")


if __name__ == "__main__":
    main()
