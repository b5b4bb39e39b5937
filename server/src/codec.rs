//! The model's own tokenizer and chat template behind [`TextCodec`].

use std::collections::HashMap;
use std::path::Path;

use gptq_text::{ChatTemplate, Conversation, Result, TextStream, Tokenizer};

use crate::text::{Pieces, PromptRequest, Span, TextCodec};

/// Tokenizer and chat template of a model's folder.
pub struct Codec {
    tokenizer: Tokenizer,
    /// Base models have none; why is said to clients that want to chat.
    template: Result<ChatTemplate, String>,
}

impl Codec {
    /// `default_system` is the system message of conversations that have none.
    ///
    /// # Errors
    /// Those of [`Tokenizer::load`]; a model without a usable chat template is refused where a client wants to chat.
    pub fn load(dir: &Path, default_system: Option<&str>) -> Result<Self> {
        let template = ChatTemplate::load(dir).map_err(|error| error.to_string());
        let template = template.map(|it| it.with_default_system(default_system.map(str::to_owned)));
        Ok(Self { tokenizer: Tokenizer::load(dir)?, template })
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

impl TextCodec for Codec {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, String> {
        self.tokenizer.encode(text, add_special).map_err(|error| error.to_string())
    }

    fn spans(&self, text: &str, add_special: bool) -> Result<Vec<Span>, String> {
        let (ids, ranges) =
            self.tokenizer.encode_with_ranges(text, add_special).map_err(|error| error.to_string())?;
        // The byte at which each character begins, and the end.
        let starts: Vec<_> = text.char_indices().map(|(byte, _)| byte).chain([text.len()]).collect();
        let byte = |character: usize| starts.get(character).copied().unwrap_or(text.len());
        let of = |(id, range): (u32, std::ops::Range<usize>)| {
            let piece = text.get(byte(range.start)..byte(range.end)).unwrap_or_default();
            Span { id, text: piece.into(), start: range.start, stop: range.end }
        };
        Ok(ids.into_iter().zip(ranges).map(of).collect())
    }

    fn longest_token(&self) -> usize {
        self.tokenizer.longest_token()
    }

    fn render(&self, request: &PromptRequest) -> Result<String, String> {
        let template = self.template.as_ref().map_err(Clone::clone)?;
        let PromptRequest { messages, tools, add_generation_prompt, continue_final_message, kwargs } =
            *request;
        let conversation =
            Conversation { messages, tools, add_generation_prompt, continue_final_message, kwargs };
        template.render(&conversation).map_err(|error| error.to_string())
    }

    fn template_source(&self, with_tools: bool) -> Option<&str> {
        self.template.as_ref().ok()?.source(with_tools)
    }

    fn end_of_turn(&self) -> Vec<u32> {
        let markers = self.template.iter().flat_map(ChatTemplate::stop_tokens);
        markers.filter_map(|marker| self.tokenizer.token_id(marker)).collect()
    }

    fn is_special(&self, id: u32) -> bool {
        self.tokenizer.is_special(id)
    }

    fn token_text(&self, id: u32) -> String {
        self.tokenizer.decode(&[id], false).unwrap_or_default()
    }

    fn pieces_keeping(&self, kept: &[&str]) -> Box<dyn Pieces> {
        let special = |token: &&str| {
            let id = self.tokenizer.token_id(token).filter(|id| self.tokenizer.is_special(*id))?;
            Some((id, token.to_string()))
        };
        Box::new(Stream {
            text: self.tokenizer.stream(true),
            kept: kept.iter().filter_map(special).collect(),
        })
    }
}

struct Stream {
    text: TextStream,
    /// Special tokens that have a text here.
    kept: HashMap<u32, String>,
}

impl Pieces for Stream {
    fn push(&mut self, id: u32) -> Result<String, String> {
        match self.kept.get(&id).cloned() {
            Some(token) => Ok(self.finish()? + &token),
            None => self.text.push(id).map(Option::unwrap_or_default).map_err(|error| error.to_string()),
        }
    }

    fn finish(&mut self) -> Result<String, String> {
        self.text.finish().map(Option::unwrap_or_default).map_err(|error| error.to_string())
    }
}
