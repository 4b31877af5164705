//! CUDA graphs.

use std::fmt;

use super::driver::RecordedGraph;
use super::handle::{Device, DeviceBackend};
use crate::cuda::error::{Error, Result};
use crate::cuda::launch::Launch;

impl Device {
    /// Records the work that `queue` queues, instead of running it, as a graph that can be launched
    /// many times at little cost. All memory that the graph uses lives until the graph is dropped.
    /// The kernels must be loaded already, and `queue` must neither allocate nor wait.
    ///
    /// # Errors
    /// The error of `queue`; [`Error::Driver`].
    pub fn record(&self, queue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let work = match self.backend() {
            DeviceBackend::Driver(d) => RecordedWork::Driver(d.record(queue)?),
            DeviceBackend::Simulated(s) => RecordedWork::Simulated(s.record(queue)?),
        };
        Ok(Graph { work, device: self.clone() })
    }
}

/// Recorded work, with the memory that it uses.
pub struct Graph {
    work: RecordedWork,
    device: Device,
}

enum RecordedWork {
    Driver(RecordedGraph),
    Simulated(Vec<Launch>),
}

// SAFETY: a graph must not be used from two threads at once, which `&mut self` of `run` excludes. It may
// move between threads, because every call binds the context to the calling thread.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph on {:?}", self.device)
    }
}

impl Graph {
    /// Queues the recorded work.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn run(&mut self) -> Result<()> {
        match (&self.work, self.device.backend()) {
            (RecordedWork::Driver(recorded), _) => {
                recorded.graph.launch().map_err(Error::driver("start a graph"))
            }
            (RecordedWork::Simulated(launches), DeviceBackend::Simulated(s)) => {
                launches.iter().for_each(|launch| s.launch(launch));
                Ok(())
            }
            (RecordedWork::Simulated(_), DeviceBackend::Driver(_)) => Ok(()),
        }
    }
}
