const $ = id => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "typical_p", "repetition_penalty", "frequency_penalty",
                 "presence_penalty", "max_tokens", "seed"];
let history = [], abort = null;

function headers() {
  return $("key").value ? {Authorization: "Bearer " + $("key").value} : {};
}
// The server may tell its model's name only with the key.
async function name() {
  try {
    const answer = await fetch("info", {headers: headers()});
    $("model").textContent = answer.status === 401 ? "needs the API key (Settings)" : (await answer.json()).model_id;
  } catch {}
}
name();
$("key").onchange = name;

function show(role, text) {
  const node = document.createElement("div");
  node.className = role;
  node.textContent = text;
  $("log").append(node);
  return node;
}
function follow() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}
// JSON, or `id: bias` pairs between commas or on lines of their own; null where nothing is given.
function biases(text) {
  if (!text.trim()) return null;
  if (text.trim().startsWith("{")) {
    try { return JSON.parse(text) } catch (error) { throw new Error("logit bias: " + error.message) }
  }
  return Object.fromEntries(text.split(/[,\n]/).filter(pair => pair.trim()).map(pair => {
    const [id, bias, ...more] = pair.split(":").map(part => part.trim());
    if (!id || !bias || isNaN(bias) || more.length) throw new Error(`logit bias: expected id: bias, got ${pair.trim()}`);
    return [id, +bias];
  }));
}
// What a server or a proxy before it says of a failure, as far as it can be understood.
async function refusal(response) {
  const text = await response.text();
  try {
    const {message} = JSON.parse(text).error;
    if (message) return message;
  } catch {}
  // A proxy's page: its text without its styles and scripts.
  const page = new DOMParser().parseFromString(text, "text/html");
  page.querySelectorAll("style, script, title").forEach(node => node.remove());
  const said = page.body.textContent.replace(/\s+/g, " ").trim().slice(0, 300);
  return [response.status, response.statusText, said].filter(part => part).join(" ");
}
function body() {
  const system = $("system").value.trim();
  const asked = {model: "gptq", stream: true, messages: (system ? [{role: "system", content: system}] : []).concat(history)};
  for (const name of NUMBERS) {
    const value = $(name).value;
    if (value !== "" && !(name === "top_k" && +value === 0)) asked[name] = +value;
  }
  const stop = $("stop").value.split("\n").filter(line => line), bias = biases($("logit_bias").value);
  if (stop.length) asked.stop = stop;
  if (bias) asked.logit_bias = bias;
  return JSON.stringify(asked);
}
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}
async function ask() {
  const node = show("assistant", ""), mine = history, own = abort = new AbortController();
  node.classList.add("waiting");
  $("send").textContent = "Stop";
  follow();
  let answer = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: {...headers(), "Content-Type": "application/json"}, body: body(), signal: own.signal,
    });
    // A page with status 200 is no answer either.
    const streams = response.headers.get("content-type")?.startsWith("text/event-stream");
    if (!response.ok || !streams) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      answer += event.choices[0]?.delta.content ?? "";
      const below = $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;
      node.textContent = answer;
      if (below) follow();
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  node.classList.remove("waiting");
  // Without an answer the question is not part of what was said.
  if (answer) mine.push({role: "assistant", content: answer});
  else { mine.pop(); node.remove(); }
  if (abort === own) abort = null;
  $("send").textContent = abort ? "Stop" : "Send";
  follow();
  $("text").focus();
}
$("form").onsubmit = event => {
  event.preventDefault();
  if (abort) return abort.abort();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  history.push({role: "user", content: text});
  show("user", text);
  ask();
};
$("text").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!abort) $("form").requestSubmit();
  }
};
document.onkeydown = event => {
  if (event.key === "Escape" && abort) abort.abort();
};
$("reset").onclick = () => {
  abort?.abort();
  history = [];
  $("log").replaceChildren();
  $("text").focus();
};
