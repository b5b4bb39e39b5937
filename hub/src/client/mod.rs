//! Asking the hub: requests, what their answers mean, when to try again and when to wait.

mod answer;
mod http;
mod pace;

use std::io::Read;
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::Body;
use ureq::http::{HeaderMap, Method, Response};

pub(crate) use self::answer::{Verdict, first_line, header, judge};
pub(crate) use self::http::{Ask, Http, Payload, host};
pub(crate) use self::pace::{Pace, Tries};
use crate::address::{Origin, follow};
use crate::error::{Cause, Error, Result, Subject};
use crate::progress::{Event, Watch};
use crate::settings::Settings;

/// Bytes of an answer that is parsed; a page of a tree has some hundred KB.
const MOST_OF_AN_ANSWER: u64 = 64 << 20;

/// A connection to a hub. Shared by all workers, which wait together when the hub asks for that.
pub struct Client {
    pub settings: Settings,
    pub(crate) http: Http,
    pub(crate) pace: Pace,
    origin: Origin,
}

impl Client {
    /// # Errors
    /// Where the certificates or the endpoint cannot be used.
    pub fn new(settings: Settings) -> Result<Self> {
        let origin = Origin::of(&settings.endpoint).ok_or_else(|| {
            let expected = "an address that begins with https:// or http://";
            Cause::Setting { name: "HF_ENDPOINT", expected, got: settings.endpoint.clone() }
        })?;
        Ok(Self { http: Http::new(&settings)?, pace: Pace::default(), origin, settings })
    }

    /// The endpoint's address with what follows.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.settings.endpoint)
    }

    /// The token where it may be shown to this address.
    pub(crate) fn token_for(&self, url: &str) -> Option<&str> {
        let token = self.settings.token.as_ref()?;
        let origin = Origin::of(url)?;
        self.origin.trusts(&origin).then_some(token.secret.as_str())
    }

    pub(crate) fn trusts(&self, url: &str) -> bool {
        Origin::of(url).is_some_and(|origin| self.origin.trusts(&origin))
    }

    /// One request, with the token where it may go, after the wait that the server has demanded.
    pub(crate) fn once(&self, ask: &Ask, subject: &Subject) -> Result<Response<Body>> {
        self.pace.wait();
        self.http.send(ask, self.token_for(&ask.url)).map_err(|cause| subject.fails(cause))
    }

    /// A request to the hub's API, tried again as long as that makes sense. Redirects to the hub itself are followed, as
    /// a repository that was renamed has them.
    pub(crate) fn call(&self, ask: &Ask, subject: &Subject, watch: &Watch) -> Result<Response<Body>> {
        let mut tries = Tries::new(&self.settings.patience);
        let mut ask = ask.clone();
        let mut hops = 0;
        loop {
            let failed = match self.once(&ask, subject) {
                Err(error) => error,
                Ok(answer) if answer.status().is_redirection() => {
                    let from = header(answer.headers(), "location").and_then(|to| follow(&ask.url, to));
                    hops += 1;
                    match from.filter(|url| self.trusts(url) && hops <= 5) {
                        Some(url) => {
                            ask.url = url;
                            continue;
                        }
                        None => return Err(subject.fails(self.no_hub("it redirects elsewhere"))),
                    }
                }
                Ok(answer) => match self.judge(answer, subject)? {
                    Judged::Good(answer) => return Ok(answer),
                    Judged::Again(error) => error,
                    Judged::Wait(pause) => {
                        self.pause(pause, &mut tries, subject, watch)?;
                        continue;
                    }
                },
            };
            self.back_off(failed, &mut tries, subject, watch)?;
        }
    }

    /// What an answer's status means here. A refusal is an error.
    pub(crate) fn judge(&self, mut answer: Response<Body>, subject: &Subject) -> Result<Judged> {
        let verdict = judge(answer.status().as_u16(), answer.headers());
        if matches!(verdict, Verdict::Good) {
            return Ok(Judged::Good(answer));
        }
        let line = match header(answer.headers(), "x-error-message") {
            Some(message) => message.to_owned(),
            None => first_line(answer.body_mut()),
        };
        match verdict {
            Verdict::Good => Ok(Judged::Good(answer)),
            Verdict::Wait(pause) => Ok(Judged::Wait(pause)),
            Verdict::Again => {
                let status = answer.status().as_u16();
                Ok(Judged::Again(subject.fails(Cause::Server { status, message: line })))
            }
            Verdict::Refused(refusal) => Err(subject.fails(refusal.cause(self, subject, line))),
        }
    }

    /// Waits before the next try, or gives the failure back where there is none.
    pub(crate) fn back_off(
        &self,
        failed: Error,
        tries: &mut Tries,
        subject: &Subject,
        watch: &Watch,
    ) -> Result<()> {
        // What was never reached will hardly be reached in a second.
        let hopeless = match &*failed.cause {
            Cause::Unreachable { .. } => !self.http.has_answered(),
            Cause::Broken { .. } | Cause::Server { .. } | Cause::Busy { .. } | Cause::Changed { .. } => false,
            _ => true,
        };
        let Some(pause) = tries.failed().filter(|_| !hopeless) else { return Err(failed) };
        let of = self.settings.patience.tries;
        watch(Event::Retry { subject, cause: &failed.cause, attempt: tries.made() + 1, of, pause });
        std::thread::sleep(pause);
        Ok(())
    }

    /// Makes all workers wait, once for all of them.
    pub(crate) fn pause(
        &self,
        asked: Option<Duration>,
        tries: &mut Tries,
        subject: &Subject,
        watch: &Watch,
    ) -> Result<()> {
        let patience = &self.settings.patience;
        let pause = asked.unwrap_or_else(|| patience.back_off * 10);
        if pause > patience.longest_wait || tries.limited().is_none() {
            return Err(subject.fails(Cause::RateLimited { seconds: pause.as_secs() }));
        }
        if self.pace.hold(pause) {
            watch(Event::Wait { pause });
        }
        Ok(())
    }

    /// The answer's JSON, and its headers.
    pub(crate) fn json<T: DeserializeOwned>(
        &self,
        ask: &Ask,
        subject: &Subject,
        watch: &Watch,
    ) -> Result<(T, HeaderMap)> {
        let mut tries = Tries::new(&self.settings.patience);
        loop {
            let mut answer = self.call(ask, subject, watch)?;
            let mut bytes = Vec::new();
            let read = answer.body_mut().as_reader().take(MOST_OF_AN_ANSWER).read_to_end(&mut bytes);
            if let Err(cause) = read {
                let broken = Cause::Broken { host: self.origin.host(), cause: cause.to_string() };
                self.back_off(subject.fails(broken), &mut tries, subject, watch)?;
                continue;
            }
            let value = serde_json::from_slice(&bytes).map_err(|cause| {
                subject.fails(match bytes.trim_ascii_start().first() {
                    Some(b'{' | b'[') => self.malformed(cause.to_string()),
                    _ => self.no_hub("its answer is no JSON"),
                })
            })?;
            return Ok((value, answer.headers().clone()));
        }
    }

    pub(crate) fn get<T: DeserializeOwned>(
        &self,
        url: &str,
        subject: &Subject,
        watch: &Watch,
    ) -> Result<(T, HeaderMap)> {
        self.json(&Ask::new(Method::GET, url), subject, watch)
    }

    pub(crate) fn malformed(&self, problem: String) -> Cause {
        Cause::Malformed { endpoint: self.settings.endpoint.clone(), problem }
    }

    pub(crate) fn no_hub(&self, problem: &'static str) -> Cause {
        Cause::NotAHub { endpoint: self.settings.endpoint.clone(), problem }
    }
}

/// What came of an answer that is no refusal.
pub(crate) enum Judged {
    Good(Response<Body>),
    /// None where the server did not say how long.
    Wait(Option<Duration>),
    Again(Error),
}
