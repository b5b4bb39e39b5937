//! Which requests are let in: clients with the key, under the server's own names, and no pages of other sites.

use serde_json::json;

use super::{Answer, Server};

/// The status of a POST to /generate with more lines in its head.
fn generate(server: &Server, lines: &str) -> u16 {
    let body = json!({"inputs": "a", "parameters": {"max_new_tokens": 1}}).to_string();
    Answer::read(server.send(&format!("POST /generate HTTP/1.1{lines}"), body.as_bytes())).status
}

fn get(server: &Server, path: &str, lines: &str) -> Answer {
    Answer::read(server.send(&format!("GET {path} HTTP/1.1{lines}"), b""))
}

#[test]
fn the_key_guards_what_computes_and_what_tells_about_model_and_load() {
    let server = Server::start("--api-key secret");
    let key = "\r\nauthorization: Bearer secret";
    assert_eq!(generate(&server, ""), 401);
    assert_eq!(generate(&server, "\r\nauthorization: Bearer wrong"), 401);
    assert_eq!(generate(&server, key), 200);
    for guarded in ["/info", "/v1/models", "/metrics"] {
        assert_eq!(server.get(guarded).status, 401, "{guarded}");
        assert_eq!(get(&server, guarded, key).status, 200, "{guarded}");
    }
    for open in ["/health", "/", "/docs", "/chat.js", "/chat.css"] {
        assert_eq!(server.get(open).status, 200, "{open}");
    }
    assert_eq!(get(&server, "/", "\r\naccept: text/html").status, 200);
}

#[test]
fn other_routes_can_be_opened_or_closed() {
    let all = Server::start("--api-key secret --open-routes health,metrics,info");
    assert_eq!((all.get("/metrics").status, all.get("/info").status), (200, 200));
    assert_eq!((all.get("/docs").status, all.get("/chat.js").status), (401, 401));
}

#[test]
fn pages_of_other_sites_get_nothing_done() {
    let server = Server::start("");
    let own = format!("\r\norigin: http://{}", server.address);
    assert_eq!(generate(&server, ""), 200, "a client that is no browser");
    assert_eq!(generate(&server, &own), 200, "the chat page");
    assert_eq!(generate(&server, "\r\norigin: https://evil.example"), 403);
    assert_eq!(generate(&server, "\r\norigin: null"), 403);
    assert_eq!(generate(&server, "\r\ncontent-type: text/plain"), 415);
    assert_eq!(generate(&server, "\r\nhost: evil.example"), 403);
    assert_eq!(get(&server, "/info", "\r\nhost: evil.example:80").status, 403);
    let answer = get(&server, "/info", "\r\norigin: https://evil.example");
    assert!(!answer.head.contains("access-control"), "{}", answer.head);
    let asks_first = "OPTIONS /generate HTTP/1.1\r\norigin: https://evil.example\r\n\
        access-control-request-method: POST\r\naccess-control-request-headers: content-type";
    let answer = Answer::read(server.send(asks_first, b""));
    assert!(answer.status == 405 && !answer.head.contains("access-control"), "{}", answer.head);
}

#[test]
fn what_is_let_in_by_flags_gets_in() {
    let server = Server::start("--cors-allow-origin https://app.example --allowed-hosts gptq.example");
    let lines = "\r\nhost: gptq.example\r\norigin: https://app.example";
    assert_eq!(generate(&server, lines), 200);
    assert_eq!(generate(&server, "\r\norigin: https://other.example"), 403);
    let answer = get(&server, "/info", lines);
    assert!(answer.head.contains("access-control-allow-origin: https://app.example"), "{}", answer.head);
}

#[test]
fn the_page_runs_nothing_but_its_own_files_and_in_no_frame() {
    let server = Server::start("");
    let page = get(&server, "/", "\r\naccept: text/html");
    for line in [
        "default-src 'none'",
        "script-src 'self'",
        "frame-ancestors 'none'",
        "x-frame-options: deny",
        "nosniff",
    ] {
        assert!(page.head.contains(line), "{line}: {}", page.head);
    }
    assert!(
        !page.body.contains("<script>") && !page.body.contains("<style>") && !page.body.contains(" style=")
    );
}

#[test]
fn nobody_is_told_where_the_model_lies() {
    let server = Server::start("");
    let (info, models) = (server.get("/info").json(), server.get("/v1/models").json());
    for name in [&info["model_id"], &models["data"][0]["id"]] {
        let name = name.as_str().unwrap();
        assert!(!name.is_empty() && !name.contains('/'), "{name}");
    }
    drop(server);
    let named = Server::start("--served-model-name mine");
    assert_eq!(named.get("/info").json()["model_id"], "mine");
}
