//! Memory of a device.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaSlice, DevicePtr, DriverError, result, sys};

use super::driver::KeepAlive;
use super::handle::{Device, DeviceBackend};
use crate::cuda::error::{Error, Result};
use crate::cuda::sync::lock;

/// The driver stages copies to the device of up to this many bytes before it returns ("API
/// synchronization behavior" of its manual).
const COPIED_AT_ONCE: usize = 64 << 10;

impl Device {
    /// Allocates `len` elements, which are zero. `what` names them in messages.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is too little, [`Error::Driver`].
    pub fn zeros<T: Pod>(&self, what: &str, len: usize) -> Result<Buffer<T>> {
        // The driver has no empty allocations.
        let bytes = (len * size_of::<T>()).max(16);
        let (owner, address) = match self.backend() {
            DeviceBackend::Simulated(s) => {
                let address = s.allocate(bytes);
                (AllocationOwner::Simulated(address), address)
            }
            DeviceBackend::Driver(d) => {
                let is_full = |e: &DriverError| e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
                let mut found = d.stream.alloc_zeros::<u8>(bytes);
                if found.as_ref().is_err_and(is_full) {
                    // Once more, after the pool has released its unused memory.
                    self.free_memory()?;
                    found = d.stream.alloc_zeros(bytes);
                }
                match found {
                    Ok(slice) => {
                        let address = slice.device_ptr(&d.stream).0;
                        (AllocationOwner::Driver(Some(slice)), address)
                    }
                    Err(e) if is_full(&e) => {
                        let free = self.free_memory()?;
                        return Err(Error::Memory {
                            what: what.into(),
                            needed: bytes as u64,
                            free,
                        });
                    }
                    Err(e) => return Err(Error::driver("allocate memory")(e)),
                }
            }
        };
        let memory = Allocation { owner, address, device: self.clone() };
        Ok(Buffer { memory: Arc::new(memory), len, elements: PhantomData })
    }

    /// Copies `data` to new memory of the device.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is too little, [`Error::Driver`].
    pub fn upload<T: Pod>(&self, what: &str, data: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.zeros(what, data.len())?;
        buffer.write(data)?;
        Ok(buffer)
    }
}

/// Memory of a device. Its release is ordered with the work on the stream.
struct Allocation {
    owner: AllocationOwner,
    address: u64,
    device: Device,
}

enum AllocationOwner {
    /// Released when dropped.
    Driver(Option<CudaSlice<u8>>),
    Simulated(u64),
}

impl Drop for Allocation {
    fn drop(&mut self) {
        match (&mut self.owner, self.device.backend()) {
            (AllocationOwner::Driver(slice), DeviceBackend::Driver(d)) => {
                // A release on a stream that is being recorded would become part of the graph. The
                // graph releases the memory instead.
                if let (Some(kept), Some(slice)) = (&mut *lock(&d.recorded), slice.take()) {
                    kept.push(Arc::new(slice));
                }
            }
            (AllocationOwner::Simulated(at), DeviceBackend::Simulated(s)) => s.release(*at),
            _ => {}
        }
    }
}

/// An array in the memory of a device.
pub struct Buffer<T> {
    memory: Arc<Allocation>,
    len: usize,
    elements: PhantomData<T>,
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} on {:?})", self.len, self.memory.device)
    }
}

impl<T> Buffer<T> {
    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.memory.device
    }

    /// The address, for work that is queued on the device's stream, which runs before the memory is
    /// released. A graph that is being recorded keeps the memory alive.
    pub(in crate::cuda) fn address(&self) -> u64 {
        self.memory.device.keep(&self.keep());
        self.memory.address
    }

    /// Keeps the memory alive.
    pub(in crate::cuda) fn keep(&self) -> KeepAlive {
        self.memory.clone()
    }

    fn backend(&self) -> &DeviceBackend {
        self.memory.device.backend()
    }
}

impl<T: Pod> Buffer<T> {
    /// Overwrites the first elements.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If `data` is longer.
    pub fn write(&mut self, data: &[T]) -> Result<()> {
        self.write_at(0, data)
    }

    /// Overwrites the elements from `at` on.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If `data` does not fit.
    pub fn write_at(&mut self, at: usize, data: &[T]) -> Result<()> {
        assert!(at <= self.len && data.len() <= self.len - at, "room for the data");
        let to = self.address() + (at * size_of::<T>()) as u64;
        match self.backend() {
            DeviceBackend::Simulated(s) => s.write(to, bytemuck::cast_slice(data)),
            DeviceBackend::Driver(d) => {
                let stream = d.bound_stream()?;
                // SAFETY: the memory is live and has room for the data. The driver stages small copies of
                // pageable memory before it returns; larger ones are waited for while `data` is
                // borrowed.
                let copied = unsafe { result::memcpy_htod_async(to, data, stream) };
                if size_of_val(data) > COPIED_AT_ONCE {
                    self.device().synchronize()?;
                }
                copied.map_err(Error::driver("copy to the device"))
            }
        }
    }

    /// Waits for queued work and copies the first elements to `to`.
    ///
    /// # Errors
    /// [`Error::Driver`] with the failure of any queued work.
    ///
    /// # Panics
    /// If `to` is longer.
    pub fn read(&self, to: &mut [T]) -> Result<()> {
        self.read_at(0, to)
    }

    /// Waits for queued work and copies the elements from `at` on to `to`.
    ///
    /// # Errors
    /// [`Error::Driver`] with the failure of any queued work.
    ///
    /// # Panics
    /// If the buffer has fewer.
    pub fn read_at(&self, at: usize, to: &mut [T]) -> Result<()> {
        assert!(at <= self.len && to.len() <= self.len - at, "as many elements");
        let from = self.address() + (at * size_of::<T>()) as u64;
        match self.backend() {
            DeviceBackend::Simulated(s) => s.read(from, bytemuck::cast_slice_mut(to)),
            DeviceBackend::Driver(d) => {
                let stream = d.bound_stream()?;
                // SAFETY: the memory is live and has as many elements, any bits are a valid `T`, and the
                // copy is waited for while `to` is borrowed.
                let copied = unsafe { result::memcpy_dtoh_async(to, from, stream) };
                self.device().synchronize()?;
                copied.map_err(Error::driver("copy from the device"))
            }
        }
    }

    /// Copies `count` elements of `from`, from element `first` on, to element `at` and those after it.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If either has fewer.
    pub fn copy_part(&mut self, at: usize, from: &Self, first: usize, count: usize) -> Result<()> {
        assert!(at + count <= self.len && first + count <= from.len, "as many elements");
        let size = size_of::<T>();
        let to = self.address() + (at * size) as u64;
        let from = from.address() + (first * size) as u64;
        match self.backend() {
            DeviceBackend::Simulated(s) => {
                let mut bytes = vec![0; count * size];
                s.read(from, &mut bytes)?;
                s.write(to, &bytes)
            }
            DeviceBackend::Driver(d) => {
                let stream = d.bound_stream()?;
                // SAFETY: both ranges are inside live memory, as checked.
                let copied = unsafe { result::memcpy_dtod_async(to, from, count * size, stream) };
                copied.map_err(Error::driver("copy on the device"))
            }
        }
    }
}
