//! The checkpoint's weights, brought to the device by a thread of its own while earlier groups are solved.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;
use std::time::Instant;

use gptq_kernels::Backend;
use gptq_runtime::layout::{self, LayerSpec, LinearGroup, Role};
use gptq_runtime::model::{self, ModelFiles};

use crate::gptq::StageWeights;
use crate::{Error, Result};

/// Groups that lie ready at most, beside the one that is being read.
const AHEAD: usize = 1;

/// Weights, and the seconds that reading them took beside other work.
pub(super) type Read<B> = (StageWeights<B>, f64);

/// All groups in the order in which they are solved.
pub struct Reader<B: Backend>(Receiver<Result<Read<B>>>);

impl<B: Backend> Reader<B> {
    /// Starts reading at layer `first`. The thread ends when everything is read or the reader is dropped.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        backend: &'scope B,
        files: &'scope ModelFiles,
        first: usize,
    ) -> Self {
        let (send, receive) = sync_channel(AHEAD);
        scope.spawn(move || read_all(backend, files, first, &send));
        Self(receive)
    }

    pub fn next(&self) -> Result<(StageWeights<B>, f64)> {
        self.0.recv().map_err(|_| Error::invalid("reading weights", "it ended too early"))?
    }
}

fn read_all<B: Backend>(backend: &B, files: &ModelFiles, first: usize, send: &SyncSender<Result<Read<B>>>) {
    for layer in first..files.config.num_hidden_layers {
        let spec = layout::layer(&files.config, layer);
        for place in solving_order(&spec) {
            let started = Instant::now();
            let weights = read(backend, files, layer, &spec.groups[place]);
            let weights = weights.map(|weights| (weights, started.elapsed().as_secs_f64()));
            let failed = weights.is_err();
            if send.send(weights).is_err() || failed {
                return;
            }
        }
    }
}

/// Places of a layer's groups in the order in which they are solved: gate and up of all experts come before down, since
/// they share a pass over the tokens.
fn solving_order(spec: &LayerSpec) -> Vec<usize> {
    let mut order: Vec<usize> = (0..spec.groups.len()).collect();
    order.sort_by_key(|place| match spec.groups[*place].role {
        Role::Qkv => 0,
        Role::O => 1,
        Role::GateUp(_) => 2,
        Role::Down(_) => 3,
    });
    order
}

/// The weights of one group.
pub(super) fn read<B: Backend>(
    backend: &B,
    files: &ModelFiles,
    layer: usize,
    group: &LinearGroup,
) -> Result<StageWeights<B>> {
    let (weights, biases) = model::dense_parts(files, layer, &group.linears)?;
    StageWeights::read(backend, &weights, &biases)
}
