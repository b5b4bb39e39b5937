//! Where the events of a request go.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Weak};

use super::Event;

/// Receives what happens to a request. It is called on the engine's thread and must not wait.
pub trait Listener: Send {
    fn take(&self, event: Event);

    /// Whether the answer is no longer wanted: the engine then drops the sequence before its next step.
    fn is_gone(&self) -> bool;
}

/// A listener for a thread that waits for the events. At most `max_new_tokens` tokens, one start, one prompt and one
/// failure arrive; the channel ends after the last. Dropping [`Events`] cancels the request.
pub fn events() -> (Box<dyn Listener>, Events) {
    let (sender, receiver) = channel();
    let alive = Arc::new(());
    (Box::new(Waiting { sender, alive: Arc::downgrade(&alive) }), Events { receiver, _alive: alive })
}

/// The events of one request, in their order; as an iterator it waits for each.
pub struct Events {
    receiver: Receiver<Event>,
    _alive: Arc<()>,
}

impl Events {
    /// The next event, where it is there already.
    ///
    /// # Errors
    /// There is none yet, or none will come.
    pub fn try_recv(&self) -> Result<Event, TryRecvError> {
        self.receiver.try_recv()
    }
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.receiver.recv().ok()
    }
}

struct Waiting {
    sender: Sender<Event>,
    /// Of the receiving end, which a sender of the standard library cannot ask for.
    alive: Weak<()>,
}

impl Listener for Waiting {
    fn take(&self, event: Event) {
        // A request that was cancelled has no receiver any more.
        let _ = self.sender.send(event);
    }

    fn is_gone(&self) -> bool {
        self.alive.strong_count() == 0
    }
}

/// For requests whose events are not needed.
pub(super) struct Unheard;

impl Listener for Unheard {
    fn take(&self, _: Event) {}

    fn is_gone(&self) -> bool {
        false
    }
}
