//! Which requests the flags let in.

use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use axum::http::HeaderValue;
use axum::http::uri::Authority;
use gptq_server::{Gate, OpenRoute, Origins};

use crate::args::{OpenRouteArg, ServeArgs};

/// All but the names of the server, which depend on where it listens.
pub fn gate(args: &ServeArgs) -> Result<Gate> {
    Ok(Gate {
        api_key: api_key(args)?,
        open: args.open_routes.iter().filter_map(|route| open_route(*route)).collect(),
        hosts: None,
        origins: origins(&args.cors_allow_origin)?,
    })
}

/// The names that the server goes by. Where only this machine can reach it, another name is one that another site pointed
/// here to let browsers take the server for a part of a site.
pub fn with_hosts(gate: Gate, args: &ServeArgs, address: IpAddr) -> Result<Gate> {
    for host in args.allowed_hosts.iter().filter(|host| *host != "*") {
        ensure!(
            host.parse::<Authority>().is_ok_and(|host| !host.as_str().contains('@')),
            "--allowed-hosts: expected NAME or NAME:PORT, got {host}"
        );
    }
    let any = args.allowed_hosts.iter().any(|host| host == "*");
    let all = any || (args.allowed_hosts.is_empty() && !address.is_loopback());
    Ok(Gate { hosts: (!all).then(|| args.allowed_hosts.clone()), ..gate })
}

/// The key that clients must send. An empty one, as an unset variable of a script leaves it, would open the server to all.
fn api_key(args: &ServeArgs) -> Result<Option<String>> {
    let (key, from) = match (&args.api_key, &args.api_key_file) {
        (Some(key), _) => (key.clone(), "--api-key (or API_KEY)".to_string()),
        (None, Some(path)) => {
            let text =
                fs::read_to_string(path).with_context(|| format!("--api-key-file {}", path.display()))?;
            (text.lines().next().unwrap_or_default().to_owned(), format!("--api-key-file {}", path.display()))
        }
        (None, None) => return Ok(None),
    };
    ensure!(!key.trim().is_empty(), "{from}: expected a key, got an empty one");
    Ok(Some(key))
}

fn open_route(route: OpenRouteArg) -> Option<OpenRoute> {
    Some(match route {
        OpenRouteArg::Health => OpenRoute::Health,
        OpenRouteArg::Page => OpenRoute::Page,
        OpenRouteArg::Docs => OpenRoute::Docs,
        OpenRouteArg::Info => OpenRoute::Info,
        OpenRouteArg::Models => OpenRoute::Models,
        OpenRouteArg::Metrics => OpenRoute::Metrics,
        OpenRouteArg::None => return None,
    })
}

fn origins(origins: &[String]) -> Result<Origins> {
    if origins.iter().any(|origin| origin == "*") {
        return Ok(Origins::Any);
    }
    let parse = |origin: &String| {
        let site = origin.split_once("://").map(|(_, site)| site);
        let sound = site.is_some_and(|site| site.parse::<Authority>().is_ok());
        let value = HeaderValue::from_str(origin).ok().filter(|_| sound);
        value.with_context(|| {
            format!("--cors-allow-origin: expected * or SCHEME://HOST without a path, got {origin:?}")
        })
    };
    match origins {
        [] => Ok(Origins::None),
        origins => Ok(Origins::Listed(origins.iter().map(parse).collect::<Result<_>>()?)),
    }
}
