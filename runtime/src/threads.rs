//! The default number of threads.

use std::collections::BTreeSet;
use std::path::Path;

/// One thread per physical core that this process may use, limited by the CPU quota of its container.
/// A second thread per core does not help, because one thread saturates the vector units.
#[must_use]
pub fn default_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    match physical_cores(Path::new("/sys/devices/system/cpu"), Path::new("/proc/self/status")) {
        Some(cores) if cores > 0 => allowed.min(cores),
        _ => allowed,
    }
}

/// The number of physical cores among the processors that the process may use; `None` on systems
/// other than Linux.
fn physical_cores(cpus: &Path, status: &Path) -> Option<usize> {
    let status = std::fs::read_to_string(status).ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = BTreeSet::new();
    for cpu in parse_list(list.trim())? {
        let siblings = cpus.join(format!("cpu{cpu}/topology/thread_siblings_list"));
        cores.insert(std::fs::read_to_string(siblings).ok()?);
    }
    Some(cores.len())
}

/// The numbers of a list such as `0-3,8`; `None` if the text is not such a list or has a number of
/// 65,536 or more.
fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut all = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last >= 1 << 16 {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_count_once() {
        let folder = tempfile::tempdir().unwrap();
        for (cpu, siblings) in [(0, "0,4"), (1, "1,5"), (4, "0,4"), (5, "1,5"), (9, "9")] {
            let topology = folder.path().join(format!("cpu{cpu}/topology"));
            std::fs::create_dir_all(&topology).unwrap();
            std::fs::write(topology.join("thread_siblings_list"), siblings).unwrap();
        }
        let status = folder.path().join("status");
        for (list, cores) in [
            ("0-1,4-5", Some(2)),
            ("0,9", Some(2)),
            ("4", Some(1)),
            ("7", None),
            ("x", None),
            ("0-99999999", None),
        ] {
            std::fs::write(&status, format!("Name:\tx\nCpus_allowed_list:\t{list}\n")).unwrap();
            assert_eq!(physical_cores(folder.path(), &status), cores, "{list}");
        }
        assert_eq!(physical_cores(folder.path(), Path::new("/nowhere")), None);
        assert!(default_threads() > 0);
    }
}
