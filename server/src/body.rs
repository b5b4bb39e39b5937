//! Bodies of requests: how large one may be, and all of them that are being read together.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;

/// Bytes of all bodies that wait to be understood: so many of the largest kind, at least.
const LARGEST_AT_ONCE: usize = 16;
const LEAST_BUDGET: usize = 32 << 20;
/// A body above the limit is read on up to here, so that its sender hears the refusal.
const LARGEST_REFUSED: usize = 64 << 20;

/// Reads bodies within a limit for each and one for all.
pub struct Bodies {
    budget: Arc<Semaphore>,
    limit: usize,
    timeout: Duration,
}

/// A body; its bytes count until it is dropped.
pub struct Bytes {
    bytes: Vec<u8>,
    _counted: Option<OwnedSemaphorePermit>,
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Bodies {
    /// `limit` bytes for each, which must arrive within `timeout`.
    pub fn new(limit: usize, timeout: Duration) -> Self {
        let budget = limit.saturating_mul(LARGEST_AT_ONCE).clamp(LEAST_BUDGET, Semaphore::MAX_PERMITS);
        Self { budget: Arc::new(Semaphore::new(budget)), limit, timeout }
    }

    /// A whole body.
    ///
    /// # Errors
    /// 413 for one above the limit, 429 where those of others leave no room, 408 for one that takes too long.
    pub async fn read(&self, body: Body) -> Result<Bytes, ApiError> {
        let read = self.read_all(body);
        tokio::time::timeout(self.timeout, read).await.unwrap_or_else(|_| Err(ApiError::slow()))
    }

    async fn read_all(&self, body: Body) -> Result<Bytes, ApiError> {
        let (mut stream, mut length) = (body.into_data_stream(), 0usize);
        let (mut bytes, mut counted) = (Vec::new(), None::<OwnedSemaphorePermit>);
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|cause| ApiError::validation(format!("body: {cause}")))?;
            length = length.saturating_add(piece.len());
            if length <= self.limit {
                let more = u32::try_from(piece.len()).map_err(|_| ApiError::too_large(self.limit))?;
                let more =
                    self.budget.clone().try_acquire_many_owned(more).map_err(|_| ApiError::overloaded())?;
                match &mut counted {
                    Some(counted) => counted.merge(more),
                    None => counted = Some(more),
                }
                bytes.extend_from_slice(&piece);
            } else if length > LARGEST_REFUSED {
                break;
            } else {
                (bytes, counted) = (Vec::new(), None);
            }
        }
        if length <= self.limit {
            Ok(Bytes { bytes, _counted: counted })
        } else {
            Err(ApiError::too_large(self.limit))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bodies_together_stay_within_their_budget() {
        let bodies =
            Bodies { budget: Arc::new(Semaphore::new(10)), limit: 8, timeout: Duration::from_secs(5) };
        let read = async |length: usize| {
            bodies.read(Body::from(vec![b'a'; length])).await.map_err(|e| e.status.as_u16())
        };
        let first = read(8).await.unwrap();
        assert_eq!(first.len(), 8);
        assert_eq!(read(3).await.err(), Some(429));
        assert_eq!(read(9).await.err(), Some(413), "too large for any time");
        assert_eq!(read(2).await.unwrap().len(), 2);
        drop(first);
        assert_eq!(read(8).await.unwrap().len(), 8);
    }

    #[tokio::test]
    async fn a_body_that_stops_arriving_is_given_up() {
        let bodies = Bodies::new(8, Duration::from_millis(20));
        let silent = Body::from_stream(futures_util::stream::pending::<Result<Vec<u8>, std::io::Error>>());
        assert_eq!(bodies.read(silent).await.err().map(|error| error.status.as_u16()), Some(408));
    }
}
