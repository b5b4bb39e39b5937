//! The manual pages: one for the program and one for every verb, none of them empty.

use std::fs;

use crate::program::{gptq, run, workplace};

#[test]
fn every_verb_has_a_page_with_its_options() {
    let folder = workplace("manual");
    run(gptq("man").arg("--out").arg(&folder)).ok();
    let page = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    assert!(page("gptq.1").contains("quantize"));
    for (name, option) in [
        ("gptq-quantize.1", "group\\-size"),
        ("gptq-serve.1", "api\\-key"),
        ("gptq-bench-decode.1", "device"),
    ] {
        assert!(page(name).contains(option), "{name}");
    }
}
