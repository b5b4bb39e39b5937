//! The engine's events on a channel that asynchronous code can wait for.

use gptq_runtime::engine::{Event, Listener};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A listener and its receiver. Closing or dropping the receiver cancels the request.
pub fn events() -> (Box<dyn Listener>, UnboundedReceiver<Event>) {
    let (sender, receiver) = unbounded_channel();
    (Box::new(Channel(sender)), receiver)
}

struct Channel(UnboundedSender<Event>);

impl Listener for Channel {
    fn take(&self, event: Event) {
        // A request that was cancelled has no receiver any more.
        let _ = self.0.send(event);
    }

    fn is_gone(&self) -> bool {
        self.0.is_closed()
    }
}
