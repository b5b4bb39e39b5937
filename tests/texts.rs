//! Calibration and evaluation texts as people have them.

use std::fs;

use serde_json::{Value, json};

use crate::program::{demo, gptq, run, run_watched, words, workplace};

/// Messages of two rows, and the text that the demo's template (ChatML) makes of them.
fn conversations() -> (Vec<Value>, String) {
    let texts = ["The city lies at the river.", "It was built in 1873 \u{2013} or so."];
    let row =
        |text: &&str| json!([{"role": "user", "content": "Go on"}, {"role": "assistant", "content": text}]);
    let written =
        |text: &&str| format!("<|im_start|>user\nGo on<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n");
    let system = "<|im_start|>system\nBe brief.<|im_end|>\n";
    let rows = texts.iter().map(row).map(|mut row| {
        row.as_array_mut().unwrap().insert(0, json!({"role": "system", "content": "Be brief."}));
        row
    });
    (rows.collect(), texts.iter().map(written).map(|text| format!("{system}{text}")).collect())
}

#[test]
fn every_form_of_a_text_has_the_perplexity_of_the_text() {
    let work = workplace("texts");
    let perplexity = |name: &str, content: &str, options: &str| {
        let path = work.join(name);
        fs::write(&path, content).unwrap();
        let mut command = gptq("eval");
        command.arg(demo()).arg("--dataset").arg(&path).args(words("--ctx 32 --device cpu --json"));
        run(command.args(words(options))).json()["perplexity"].as_f64().unwrap()
    };
    let (rows, text) = conversations();
    let expected = perplexity("text.txt", &text, "");
    let same = |name: &str, content: &str, options: &str| {
        assert_eq!(perplexity(name, content, options), expected, "{name} {options}");
    };
    same("raw.txt", &text, "--join raw");
    same("marked.TXT", &format!("\u{feff}{text}"), "");
    let lines = |rows: Vec<Value>| rows.iter().map(|row| format!("{row}\r\n")).collect::<String>();
    same("text.JSONL", &("\u{feff}".to_owned() + &lines(vec![json!({"text": text})])), "");
    same("array.json", &json!([{"body": text, "id": 7}]).to_string(), "--text-field body");
    let messages = rows.iter().map(|row| json!({"messages": row})).collect();
    same("messages.jsonl", &lines(messages), "--join raw");
    let share = |row: &Value| {
        let from = ["system", "human", "gpt"].into_iter().zip(row.as_array().unwrap());
        from.map(|(from, message)| json!({"from": from, "value": message["content"]})).collect::<Value>()
    };
    let shared: Vec<_> = rows.iter().map(|row| json!({"conversations": share(row)})).collect();
    same("shared.json", &Value::from(shared).to_string(), "--join lines");
    let alpaca = |row: &Value| json!({"system": "Be brief.", "instruction": row[1]["content"], "output": row[2]["content"]});
    same("alpaca.jsonl", &lines(rows.iter().map(alpaca).collect()), "--join raw");
}

#[test]
#[cfg_attr(not(target_os = "linux"), ignore = "needs /proc")]
fn a_long_text_takes_little_memory() {
    let work = workplace("long-text");
    let path = work.join("long.jsonl");
    let row = json!({"text": "The city of the north lies at a river and has a harbour. ".repeat(20)})
        .to_string()
        + "\n";
    fs::write(&path, row.repeat(30_000_000 / row.len())).unwrap();
    // Encoding it whole takes over 3 GB.
    let limited = |verb: &str, options: &str| {
        let mut command = gptq(verb);
        command.arg(demo()).arg("--dataset").arg(&path).args(words(options));
        let (run, peak) = run_watched(&mut command);
        run.ok();
        println!("{verb}: {} MB", peak >> 20);
        assert!(peak > 0 && peak < 1 << 29, "{verb} took {} MB", peak >> 20);
    };
    limited("eval", "--ctx 64 --max-windows 2 --device cpu");
    for sampling in ["random", "consecutive"] {
        let out = work.join(sampling);
        let options =
            format!("--samples 2 --seq-len 64 --device cpu --sampling {sampling} --out {}", out.display());
        limited("quantize", &options);
        let log: Value = serde_json::from_slice(&fs::read(out.join("quantize_log.json")).unwrap()).unwrap();
        assert_eq!(log["calibration"]["join"], "lines");
    }
}
