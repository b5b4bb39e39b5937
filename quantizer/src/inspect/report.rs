//! The findings of an inspection, and their text.

use serde::Serialize;

use crate::engines::Verdict;
use crate::table::human_size;

/// The findings.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub architecture: String,
    pub layers: usize,
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub context: usize,
    pub quantization: Option<Quantization>,
    /// Which programs load it; empty where nothing is quantized.
    pub engines: Vec<Verdict>,
    /// File names with their bytes.
    pub files: Vec<(String, u64)>,
    pub tensors: usize,
    pub elements: u64,
    pub sound: bool,
    /// One line each: where, expected, got.
    pub problems: Vec<String>,
    /// What is amiss without making a number wrong; a line each kind.
    pub notes: Vec<String>,
}

/// Parameters as declared, and what the tensors show.
#[derive(Clone, Debug, Serialize)]
pub struct Quantization {
    pub bits: u32,
    pub group_size: i64,
    pub act_order: bool,
    pub sym: bool,
    pub static_groups: bool,
    pub damp_percent: f64,
    pub declared_format: String,
    pub g_idx: GroupIndex,
    pub bias_tensors: bool,
    /// Linears that are not quantized.
    pub dense_linears: usize,
    /// Whether single modules have settings of their own.
    pub own_settings: bool,
}

/// How input features are assigned to groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupIndex {
    /// No tensor: feature i is in group i / group_size.
    Absent,
    /// The tensor says the same.
    Contiguous,
    /// Features of one group lie apart: readers must follow the tensor.
    ActOrder,
}

impl Report {
    pub fn is_sound(&self) -> bool {
        self.sound
    }

    /// For people.
    pub fn to_terminal(&self) -> String {
        let mut text = format!(
            "architecture  {}, {} layers, hidden size {}, vocabulary {}, context {}\n",
            self.architecture, self.layers, self.hidden_size, self.vocab_size, self.context
        );
        match &self.quantization {
            None => text += "weights       floating point, not quantized\n",
            Some(q) => text += &q.lines(),
        }
        for (name, bytes) in &self.files {
            text += &format!("file          {name}, {bytes} bytes ({})\n", human_size(*bytes));
        }
        text += &format!("tensors       {}, {} elements\n", self.tensors, self.elements);
        for (i, verdict) in self.engines.iter().enumerate() {
            let label = if i == 0 { "loads in" } else { "" };
            let answer = if verdict.loads { "yes" } else { "no" };
            let reason = verdict.reason.as_ref().map_or(String::new(), |reason| format!(", {reason}"));
            text += &format!("{label:<14}{:<32}{answer}{reason}\n", verdict.engine);
        }
        for note in &self.notes {
            text += &format!("note          {note}\n");
        }
        for problem in &self.problems {
            text += &format!("problem       {problem}\n");
        }
        text + if self.sound { "verdict       sound\n" } else { "verdict       NOT sound\n" }
    }
}

impl Quantization {
    fn lines(&self) -> String {
        let group = if self.group_size < 0 {
            "one group a row".into()
        } else {
            format!("groups of {}", self.group_size)
        };
        let kind = if self.sym { "symmetric" } else { "asymmetric" };
        let order = match (self.act_order, self.static_groups) {
            (true, _) => "act-order",
            (false, true) => "static groups in file order",
            (false, false) => "groups in file order",
        };
        let g_idx = match self.g_idx {
            GroupIndex::Absent => "absent, groups are contiguous",
            GroupIndex::Contiguous => "contiguous groups",
            GroupIndex::ActOrder => "act-order, readers must follow it",
        };
        let own = if self.own_settings { ", settings of their own for some" } else { "" };
        let dense = match self.dense_linears {
            0 => String::new(),
            count => format!("not quantized {count} linears\n"),
        };
        let bias = if self.bias_tensors { "yes" } else { "no" };
        format!(
            "weights       {} bits, {group}, {kind}, {order}, damp {}{own}\nformat        {}\n\
             g_idx         {g_idx}\nbias tensors  {bias}\n{dense}",
            self.bits, self.damp_percent, self.declared_format
        )
    }
}
