//! Templates that ask for more than there is: each is an error of its prompt, in one line and in time.

use std::time::{Duration, Instant};

use gptq_text::chat::{ChatTemplate, Conversation, message};

/// What the template of a model's folder makes of one message.
fn prompt(source: &str) -> Result<String, String> {
    let config = serde_json::json!({"chat_template": source, "bos_token": "<s>"}).to_string();
    let messages = [message("user", "Hi")];
    ChatTemplate::from_config(config.as_bytes())
        .and_then(|template| template.render(&Conversation::new(&messages)))
        .map_err(|error| error.to_string())
}

fn refused(name: &str, source: &str) {
    let started = Instant::now();
    let refusal = match prompt(source) {
        Ok(prompt) => panic!("{name}: a prompt of {} bytes", prompt.len()),
        Err(refusal) => refusal,
    };
    let took = started.elapsed();
    println!("{name:<30} {:>7.1} ms  {refusal}", took.as_secs_f64() * 1e3);
    assert!(took < Duration::from_secs(7), "{name}: {took:?}");
    assert!(refusal.starts_with("chat template: ") && refusal.len() < 500, "{name}: {refusal}");
    assert!(!refusal.contains('\n') && !refusal.contains("panicked"), "{name}: {refusal}");
}

/// `step` a thousand times over, on a namespace.
fn repeated(before: &str, step: &str, after: &str) -> String {
    format!("{{% set ns = namespace() %}}{before}{{% for i in range(1000) %}}{step}{{% endfor %}}{after}")
}

#[test]
fn work_that_grows_is_stopped() {
    let doubled =
        |by: &str| repeated("{% set ns.x = 'ab' %}", &format!("{{% set ns.x = {by} %}}"), "{{ ns.x }}");
    let lists = |by: &str, after: &str| {
        repeated("{% set ns.x = [1, 2] %}{% set ns.y = [1, 2] %}", &format!("{{% set ns.x = {by} %}}"), after)
    };
    let loops = "{% for a in range(99999) %}".repeat(6);
    for (name, source) in [
        ("nested loops", format!("{loops}x{}", "{% endfor %}".repeat(6))),
        ("text + text", doubled("ns.x + ns.x")),
        ("text ~ text", doubled("ns.x ~ ns.x")),
        ("text ~ list", doubled("ns.x ~ [ns.x]")),
        ("text * number", doubled("ns.x * 1000000")),
        ("number * text", doubled("1000000 * ns.x")),
        ("replace", doubled("ns.x | replace('a', ns.x)")),
        (".replace", doubled("ns.x.replace('', ns.x)")),
        ("join", doubled("[ns.x, ns.x] | join(ns.x)")),
        (".join", doubled("ns.x.join([ns.x, ns.x])")),
        ("format", doubled("'%s%s' | format(ns.x, ns.x)")),
        (".format", doubled("'{0}{0}'.format(ns.x)")),
        (
            "upper",
            repeated(
                "{% set ns.x = 'a' * 1000000 %}{% set ns.l = [] %}",
                "{% set ns.l = ns.l + [ns.x | upper] %}",
                "",
            ),
        ),
        ("capture", doubled("ns.x").replace("= ns.x %}", "%}{{ ns.x }}{{ ns.x }}{% endset %}")),
        (
            "filter block",
            repeated(
                "{% set ns.x = 'ab' %}",
                "{% set ns.x %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}",
                "",
            ),
        ),
        ("list + list", lists("ns.x + ns.x", "{{ ns.x | length }}")),
        ("list * number", lists("ns.x * 1000000", "{{ ns.x | length }}")),
        ("chain", lists("ns.x | chain(ns.x)", "{{ ns.x | list | length }}")),
        ("list of lists", lists("[ns.x, ns.x]", "{{ ns.x }}")),
        ("list of lists as JSON", lists("[ns.x, ns.x]", "{{ ns.x | tojson }}")),
        ("mapping of mappings", lists("{'a': ns.x, 'b': ns.x}", "{{ ns.x ~ '' }}")),
        ("namespaces", lists("namespace(a=ns.x, b=ns.x)", "{{ ns.x }}")),
        ("lists compared", lists("[ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y]", "{{ ns.x == ns.y }}")),
        ("lists tested", lists("[ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y]", "{{ ns.x is eq ns.y }}")),
        ("lists sought", lists("[ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y]", "{{ ns.x in [ns.y] }}")),
        ("lists sorted", lists("[ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y]", "{{ [ns.x, ns.y] | sort }}")),
        ("lists unique", lists("[ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y]", "{{ [ns.x, ns.y] | unique }}")),
        ("lists printed", lists("[ns.x, ns.x]", "{{ ns.x | pprint }}")),
        ("ranges kept", repeated("{% set ns.l = [] %}", "{% set ns.l = ns.l + [range(99999) | list] %}", "")),
        (
            "characters kept",
            repeated(
                "{% set ns.l = [] %}{% set t = 'a' * 100000 %}",
                "{% set ns.l = ns.l + [t | list] %}",
                "",
            ),
        ),
        ("text between tags", format!("{loops}{}{}", "many words ".repeat(9999), "{% endfor %}".repeat(6))),
        (
            "text in a capture",
            format!(
                "{{% set x %}}{loops}{}{}{{% endset %}}",
                "many words ".repeat(9999),
                "{% endfor %}".repeat(6)
            ),
        ),
        (
            "raw text",
            format!(
                "{loops}{{% raw %}}{}{{% endraw %}}{}",
                "many words ".repeat(9999),
                "{% endfor %}".repeat(6)
            ),
        ),
        (
            "a macro that calls itself",
            "{% macro f(x) %}{{ f(x ~ x) }}{{ f(x) }}{% endmacro %}{{ f('a') }}".into(),
        ),
        (
            "a macro that calls twice",
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
                .into(),
        ),
        (
            "a recursive loop",
            "{% for x in [1] recursive %}{{ loop([1, 2]) }}{{ loop([1, 2]) }}{% endfor %}".into(),
        ),
        ("a block in itself", "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}".into()),
    ] {
        refused(name, &source);
    }
}

#[test]
fn huge_numbers_are_refused() {
    for source in [
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%.1000000000f' | format(1.5) }}",
        "{{ '%0999999999999999999999999d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ '%*d' | format(1000000000, 1) }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'.rjust(10 ** 30) }}",
        "{{ 'a'.zfill(1000000000) }}",
        "{{ 'a' | indent(1000000000, true) }}",
        "{{ {'a': 1} | tojson(indent=1000000000) }}",
        "{{ {'a': 1} | tojson(indent='a' * 1000000) }}",
        "{{ 'a' * 10000000000 }}",
        "{{ [1] * 10000000000 }}",
        "{{ range(1000000000) | length }}",
        "{{ range(0, 1000000000, 1) | list }}",
        "{{ 2 ** 100000000 }}",
        "{{ [1] | batch(1000000000, 'x') | list }}",
        "{{ [1] | slice(1000000000) | list }}",
        "{{ 'a' * 99999999 ~ 'a' * 99999999 ~ 'a' * 99999999 }}",
        "{% include 'chat_template.jinja' %}",
        "{% extends 'chat_template.jinja' %}",
        "{% import 'chat_template.jinja' as x %}",
        "{{ debug() }}",
    ] {
        refused(source, source);
    }
}

#[test]
fn sources_that_are_deep_are_refused_when_they_are_loaded() {
    let n = 100_000;
    for (name, source) in [
        ("a long sum", format!("{{{{ 1{} }}}}", "+1".repeat(n))),
        ("brackets", format!("{{{{ {}1{} }}}}", "[".repeat(n), "]".repeat(n))),
        ("fewer brackets", format!("{{{{ {}1{} }}}}", "[".repeat(900), "]".repeat(900))),
        ("parentheses", format!("{{{{ {}1{} }}}}", "(".repeat(900), ")".repeat(900))),
        ("braces", format!("{{{{ {}1{} }}}}", "{1:".repeat(600), "}".repeat(600))),
        ("brackets that do not close", format!("{{{{ {}", "[".repeat(1900))),
        ("nots", format!("{{{{ {}1 }}}}", "not ".repeat(n / 2))),
        ("signs", format!("{{{{ {}1 }}}}", "-".repeat(n))),
        ("conditions", "{% if 1 %}".repeat(20_000)),
        ("macros", format!("{}{}", "{% macro a() %}".repeat(8_000), "{% endmacro %}".repeat(8_000))),
        ("too large", "x".repeat(1 << 20)),
        ("one open tag", format!("{{% set x = {}", "a ".repeat(n))),
    ] {
        refused(name, &source);
    }
    // As deep as the limits let them be: read or refused, and no crash.
    for source in [
        format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 1 == 2 %}".repeat(15_000)),
        format!("{{{{ 1{} }}}}", "+1".repeat(900)),
        format!("{{{{ 1{} }}}}", "-1".repeat(900)),
        format!("{{{{ bos_token{} }}}}", ".a".repeat(900)),
        format!("{{{{ bos_token{} }}}}", "|upper".repeat(900)),
        format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(450)),
        format!("{{{{ {}1 }}}}", "not ".repeat(1900)),
        format!("{{{{ {}1 }}}}", "-".repeat(1900)),
        format!("{{{{ 1{} }}}}", "**1".repeat(900)),
        "{{ 1 }}".repeat(30_000),
        "{% set x = 1 %}".repeat(15_000),
        "{%".repeat(100_000),
        "{{ '".repeat(60_000),
        "{#".repeat(100_000),
        "{% raw %}".repeat(20_000),
    ] {
        let started = Instant::now();
        let result = prompt(&source);
        println!("{:<30} {:>7.1} ms  {result:.100?}", &source[..24], started.elapsed().as_secs_f64() * 1e3);
        assert!(started.elapsed() < Duration::from_secs(5));
        assert!(!result.is_err_and(|error| error.contains("panicked")));
    }
}

/// A value that is nested by every step is dropped, compared and printed level by level.
#[test]
fn values_as_deep_as_steps_can_make_them_fit_the_stack() {
    for step in [
        "[ns.x]",
        "{'a': ns.x}",
        "namespace(a=ns.x)",
        "dict(a=ns.x)",
        "ns.x[0:]",
        "ns.x[::-1]",
        "ns.x | reverse",
        "ns.x | chain([1])",
        "[ns.x, ns.y]",
        "ns.x | batch(1)",
        "ns.x | map('string')",
        "[[[[[[[[[[ns.x]]]]]]]]]]",
        "ns.x + [1]",
        "[1] | zip(ns.x)",
        "ns.x | items",
    ] {
        for after in [
            "",
            "{{ ns.x }}",
            "{{ ns.x == ns.y }}",
            "{{ ns.x | length }}",
            "{{ [ns.x, ns.y] | sort }}",
            "{% for i in ns.x %}{{ i }}{% endfor %}",
            "{{ {ns.x: 1} }}",
        ] {
            let y = step.replace("ns.x", "ns.y");
            let source = format!(
                "{{% set ns = namespace(x=[1], y=[1]) %}}{{% for i in range(60000) %}}{{% set ns.x = {step} %}}{{% endfor %}}{{% for i in range(9) %}}{{% set ns.y = {y} %}}{{% endfor %}}{after}"
            );
            let started = Instant::now();
            let result = prompt(&source).map(|prompt| prompt.len());
            let took = started.elapsed();
            if took > Duration::from_secs(1) {
                println!("{step:<20} {after:<30} {:>7.1} ms {result:.120?}", took.as_secs_f64() * 1e3);
            }
            assert!(took < Duration::from_secs(7), "{step} {after}");
            assert!(!result.is_err_and(|error| error.contains("panicked")));
        }
    }
}
