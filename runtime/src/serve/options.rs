//! [`ServeOptions`]: what a server is started with.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use crate::engine::OpenOptions;
use crate::error::{Error, Result};
use crate::scheduler::SchedulerOptions;

/// Options of [`serve`](super::serve).
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// The models: `.stb` files or checkpoints.
    pub files: Vec<PathBuf>,
    /// Names of the models, in the order of the files. The others have the names of their files.
    pub aliases: Vec<String>,
    /// How to open them.
    pub open: OpenOptions,
    /// Whether to use the chat templates of the models.
    pub template: bool,
    /// The address to listen on, a name or an IP address.
    pub host: String,
    /// The port; 0 for any free one, which is printed.
    pub port: u16,
    /// Keys of which clients have to send one; empty for none.
    pub keys: Vec<String>,
    /// Origins whose pages may use the server besides its own page, such as `https://example.com`; `*` for all.
    pub origins: Vec<String>,
    /// Slots, context and queue of each model.
    pub scheduler: SchedulerOptions,
    /// The longest time for an answer.
    pub timeout: Duration,
    /// Write prompts and answers to the log.
    pub log_prompts: bool,
}

impl ServeOptions {
    /// The address to listen on.
    ///
    /// # Errors
    /// [`Error::Usage`] if the host is unknown, or if other machines could use the server without a key.
    pub(super) fn address(&self) -> Result<SocketAddr> {
        let host = &self.host;
        let unknown = || Error::usage(format!("--host {host}: there is no such address"));
        let mut all = (host.as_str(), self.port).to_socket_addrs().map_err(|_| unknown())?;
        let address = all.next().ok_or_else(unknown)?;
        if !address.ip().is_loopback() && self.keys.is_empty() {
            return Err(Error::usage(format!(
                "--host {host} lets other machines use the server: give a key (--api-key or --api-key-file), or use \
                 --host 127.0.0.1"
            )));
        }
        if self.keys.iter().any(|key| key.is_empty() || key.chars().any(|c| !c.is_ascii_graphic()))
        {
            return Err(Error::usage(
                "API keys consist of printable ASCII characters without spaces",
            ));
        }
        Ok(address)
    }
}

/// Whether a host name or address in a header is this machine.
pub(super) fn is_local(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
