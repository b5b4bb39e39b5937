//! What goes wrong, where and how often.

use crate::World;

#[derive(Clone, Debug)]
pub struct Fault {
    pub on: On,
    /// Requests that are left alone before.
    pub skip: usize,
    /// Requests that are hit then.
    pub times: usize,
    pub what: What,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Commits, trees, refs.
    Api,
    /// `/resolve/`
    Resolve,
    /// A file from the storage.
    Storage,
    /// A commit.
    Commit,
    /// A file on its way to the storage.
    Upload,
    /// The parts of a file being put together.
    Complete,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// An answer with this status and a page of HTML.
    Status(u16),
    /// 429, and how many seconds to wait.
    TooMany(u64),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// The whole file with 200 where a range was asked for.
    IgnoreRange,
    /// Bytes that are not the file's, as many of them.
    WrongBytes,
    /// A body that is shorter than the file, and says so.
    Short(usize),
    /// A pause of so many milliseconds before each piece of the body; of an upload, before the answer.
    Slow(u64),
    /// A page of HTML with status 200.
    Page,
    /// The answer to a range is another one.
    WrongRange,
    /// The commit is made, and 500 is answered.
    DoneThenFail,
    /// No `X-Repo-Commit`.
    NoCommitHeader,
    /// No `X-Linked-Etag`.
    NoLinkedEtag,
    /// A redirect within the hub first.
    Relative,
}

impl World {
    /// The fault that hits this request, if one does.
    pub fn strike(&mut self, on: On) -> Option<What> {
        for fault in self.faults.iter_mut().filter(|fault| fault.on == on) {
            if fault.skip > 0 {
                fault.skip -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                return Some(fault.what.clone());
            }
        }
        None
    }
}
