//! Devices, their memory, and the launch of kernels.

mod buffer;
mod driver;
mod graph;
mod handle;
mod info;

pub use buffer::Buffer;
pub(super) use driver::KeepAlive;
pub use graph::Graph;
pub use handle::Device;
pub use info::{DeviceInfo, devices};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::error::Error;

    /// A machine without a device reports why; on a machine with one, the device opens.
    #[test]
    fn a_machine_without_a_device_reports_why() {
        match devices() {
            Err(e) => {
                let text = e.to_string();
                assert!(matches!(e, Error::Unavailable { .. }), "{text}");
                assert!(text.starts_with("no CUDA device: "), "{text}");
                assert!(!text.contains('\n'), "{text}");
                assert!(Device::open(0).is_err());
            }
            Ok(all) => {
                let device = Device::open(all[0].ordinal).unwrap();
                let mut buffer = device.upload("numbers", &[1.0f32, 2.0, 3.0]).unwrap();
                buffer.write(&[5.0]).unwrap();
                let mut back = [0.0; 3];
                buffer.read(&mut back).unwrap();
                assert_eq!(back, [5.0, 2.0, 3.0]);
                assert!(Device::open(all.len()).is_err());
            }
        }
    }
}
