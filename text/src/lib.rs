//! Text and token ids: the model's [`Tokenizer`], [`ChatTemplate`]s, which write conversations the way a model was trained
//! to read them, [`TextStream`], which turns generated ids into text while they arrive, and [`StopStrings`], which end it.
//!
//! ```
//! use gptq_text::{ChatTemplate, Conversation, Tokenizer, chat::message};
//!
//! # fn main() -> gptq_text::Result<()> {
//! let tokenizer_json = r#"{
//!     "version": "1.0",
//!     "added_tokens": [],
//!     "pre_tokenizer": {"type": "Whitespace"},
//!     "model": {"type": "WordLevel", "vocab": {"to": 0, "be": 1, "or": 2, "not": 3}, "unk_token": "to"}
//! }"#;
//! let tokenizer = Tokenizer::from_bytes(tokenizer_json.as_bytes(), None)?;
//! assert_eq!(tokenizer.encode("to be or not", false)?, [0, 1, 2, 3]);
//!
//! let config = r#"{"chat_template": "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"}"#;
//! let template = ChatTemplate::from_config(config.as_bytes())?;
//! assert_eq!(template.render(&Conversation::new(&[message("user", "Hi")]))?, "<user> Hi");
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod chat;
mod error;
pub mod stop_strings;
#[doc(hidden)]
pub mod testing;
mod text_stream;
pub mod tokenizer;
mod tokenizer_config;

pub use crate::chat::{ChatTemplate, Conversation};
pub use crate::error::{Error, Result};
pub use crate::stop_strings::StopStrings;
pub use crate::text_stream::TextStream;
pub use crate::tokenizer::Tokenizer;
