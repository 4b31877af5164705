//! A thread pool whose workers spin between parallel regions: decoding a token takes hundreds of short
//! regions, and waking a sleeping thread for each would take longer than the work.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a waiting thread spins: longer than the time between two regions of a token.
const SPIN: Duration = Duration::from_micros(200);
/// After spinning, a thread yields to other threads for this long; then it sleeps.
const YIELD: Duration = Duration::from_millis(5);

/// If the caller waits this long for a worker, and several times as long as a task takes, the worker has
/// lost its core to another program, and sharing work would mean waiting for the scheduler again and again.
const LATE: Duration = Duration::from_millis(1);
/// The caller then works alone for this many times the time that it waited.
const SERIAL_FACTOR: u32 = 20;
/// The longest time for which the caller works alone.
const SERIAL_LIMIT: Duration = Duration::from_secs(1);

/// Threads for parallel regions. The caller of [`Pool::run`] works too, so a pool of one thread
/// has none of its own.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<PoolShared>,
    workers: Vec<JoinHandle<()>>,
    /// Locked during a region; other callers then work alone. Holds the time until which regions run on their
    /// caller only.
    busy: Mutex<Option<Instant>>,
}

/// The function of the current region, called with the index of each task.
type PoolTask<'a> = dyn Fn(usize) + Sync + 'a;

#[derive(Debug)]
struct PoolShared {
    /// Number of regions so far; workers wait for a change.
    generation: AtomicU32,
    /// [`OPEN`] while a region may be entered, plus the number of workers inside.
    gate: AtomicU32,
    /// By thread, the caller first.
    ranges: Box<[TaskRange]>,
    job: UnsafeCell<PoolJob>,
    /// The first panic of a worker.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicU32,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

/// Indices of consecutive tasks that belong to one thread. Consecutive tasks read consecutive memory, so
/// hardware prefetching helps. The owner takes tasks from the start; threads that have run out of tasks
/// take them from the end.
#[derive(Default, Debug)]
#[repr(align(64))]
struct TaskRange(AtomicU64);

impl TaskRange {
    /// Sets the range. No thread may take tasks at the same time.
    fn set(&self, first: u32, end: u32) {
        self.0.store(u64::from(first) << 32 | u64::from(end), Ordering::Relaxed);
    }

    fn bounds(packed: u64) -> (u32, u32) {
        ((packed >> 32) as u32, packed as u32)
    }

    fn left(&self) -> u32 {
        let (first, end) = Self::bounds(self.0.load(Ordering::Relaxed));
        end.saturating_sub(first)
    }

    fn take(&self, from_end: bool) -> Option<usize> {
        let shorter = |packed| {
            let (first, end) = Self::bounds(packed);
            let less = if from_end { packed.wrapping_sub(1) } else { packed.wrapping_add(1 << 32) };
            (first < end).then_some(less)
        };
        // The gate orders the reads and writes of tasks.
        let packed = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shorter).ok()?;
        let (first, end) = Self::bounds(packed);
        Some(if from_end { end - 1 } else { first } as usize)
    }
}

/// A slice whose disjoint pieces several threads use.
struct SplitSlice<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: the value stands for an exclusive borrow of elements that may be sent to other threads; threads
// get disjoint pieces.
unsafe impl<T: Send> Sync for SplitSlice<T> {}

impl<T> SplitSlice<T> {
    /// # Safety
    /// `first + len` must be within the slice, and no one else may use these elements at the same time.
    #[expect(clippy::mut_from_ref, reason = "pieces are disjoint by the caller's promise")]
    unsafe fn piece(&self, first: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller promises that `first` is within the slice.
        let start = unsafe { self.start.add(first) };
        // SAFETY: the caller promises that the `len` elements from there are, too, and that they are not used
        // elsewhere.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

#[derive(Clone, Copy, Debug)]
struct PoolJob {
    task: Option<*const PoolTask<'static>>,
}

const OPEN: u32 = 1 << 31;

// SAFETY: `job` is the only field that is not `Sync` (a cell with a pointer). It is written only by
// the holder of `Pool::busy` while the gate is closed and nobody inside, and read only by workers
// inside the gate, which enter by an acquiring exchange that sees the opening release. The pointer's
// target is `Sync`, and outlives the region: `run` returns only when the gate is closed and empty.
unsafe impl Sync for PoolShared {}
// SAFETY: no field is bound to a thread; the pointer in `job` is used as described above.
unsafe impl Send for PoolShared {}

impl Pool {
    /// A pool of `threads` threads: the caller and `threads − 1` workers.
    ///
    /// # Errors
    /// If the system cannot start a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let mut pool = Self::without_workers(threads.max(1));
        for i in 1..threads {
            let shared = pool.shared.clone();
            let name = format!("stb-{i}");
            let work = move || shared.work(i);
            pool.workers.push(std::thread::Builder::new().name(name).spawn(work)?);
        }
        Ok(pool)
    }

    /// A pool without threads of its own.
    #[must_use]
    pub fn serial() -> Self {
        Self::without_workers(1)
    }

    /// A pool for `threads` threads, with no worker started.
    fn without_workers(threads: usize) -> Self {
        let shared = PoolShared {
            generation: AtomicU32::new(0),
            gate: AtomicU32::new(0),
            ranges: (0..threads).map(|_| TaskRange::default()).collect(),
            job: UnsafeCell::new(PoolJob { task: None }),
            panic: Mutex::new(None),
            sleepers: AtomicU32::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared), workers: Vec::new(), busy: Mutex::new(None) }
    }

    /// Cuts each of `parts` into pieces of `chunk` elements (the last piece of a part may be shorter) and
    /// calls `task` for every piece, on all threads, with the index of the part, the index of the first
    /// element in it, and the piece.
    ///
    /// # Panics
    /// If a task does, or if `chunk` is 0.
    pub fn run_parts<T: Send, const N: usize>(
        &self,
        parts: [&mut [T]; N],
        chunk: usize,
        task: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        let parts = parts.map(|part| SplitSlice { start: part.as_mut_ptr(), len: part.len() });
        let count = |part: &SplitSlice<T>| part.len.div_ceil(chunk);
        self.run(parts.iter().map(count).sum(), |mut index| {
            for (i, part) in parts.iter().enumerate() {
                if index < count(part) {
                    let first = index * chunk;
                    let len = chunk.min(part.len - first);
                    // SAFETY: first + len ≤ part.len, so the piece lies inside an exclusive borrow
                    // that lasts as long as `run`; every index comes once, and different indices
                    // are different pieces.
                    let piece = unsafe { part.piece(first, len) };
                    return task(i, first, piece);
                }
                index -= count(part);
            }
        });
    }

    /// [`Pool::run_parts`] of one part.
    ///
    /// # Panics
    /// As [`Pool::run_parts`].
    pub fn run_chunks<T: Send>(
        &self,
        data: &mut [T],
        chunk: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        self.run_parts([data], chunk, |_, first, piece| task(first, piece));
    }

    /// The number of threads, including the caller.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// This pool if `worth` is true, else a pool without workers.
    #[must_use]
    pub fn or_serial(&self, worth: bool) -> &Self {
        static SERIAL: OnceLock<Pool> = OnceLock::new();
        if worth { self } else { SERIAL.get_or_init(Self::serial) }
    }

    /// Calls `task` with every index below `tasks`, on all threads, and returns when all calls have
    /// returned. Every thread starts with an equal share of consecutive indices, and takes tasks from the
    /// others when its own are done, so that a preempted worker holds up only its current task. After
    /// waiting for a preempted worker, the caller works alone for a while. The caller also works alone while
    /// another thread runs a region of this pool.
    ///
    /// # Panics
    /// If a task does.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        let count = u32::try_from(tasks);
        let alone = self.workers.is_empty() || tasks < 2 || count.is_err();
        let busy = match self.busy.try_lock() {
            _ if alone => None,
            Ok(busy) => Some(busy),
            // A task panicked in an earlier region, which has ended.
            Err(TryLockError::Poisoned(busy)) => Some(busy.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let Some(mut busy) = busy else {
            (0..tasks).for_each(task);
            return;
        };
        let started = Instant::now();
        if busy.is_some_and(|until| started < until) {
            (0..tasks).for_each(task);
            return;
        }
        let short: *const PoolTask<'_> = &raw const task;
        // SAFETY: only the lifetime changes; `region` ends before `task` is dropped, and workers
        // use the pointer only inside the region.
        let long =
            unsafe { std::mem::transmute::<*const PoolTask<'_>, *const PoolTask<'static>>(short) };
        // SAFETY: `busy` is held, and the gate has been closed and empty since the last region, so no
        // worker reads the job.
        unsafe { *self.shared.job.get() = PoolJob { task: Some(long) } };
        let region = ParallelRegion::open(&self.shared, count.unwrap_or(0));
        let own = region.0.take_tasks(&task, 0);
        let worked = started.elapsed();
        drop(region);
        let waited = started.elapsed() - worked;
        let late = waited > LATE && waited > 4 * worked / own.max(1);
        *busy = late.then(|| Instant::now() + (waited * SERIAL_FACTOR).min(SERIAL_LIMIT));
        let panic = self.shared.panic.lock().map_or(None, |mut panic| panic.take());
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.announce();
        for worker in self.workers.drain(..) {
            // Workers catch the panics of tasks, so there is no error to report.
            drop(worker.join());
        }
    }
}

/// A region that workers may enter until it is dropped, which also happens if the caller's task panics.
struct ParallelRegion<'a>(&'a PoolShared);

impl<'a> ParallelRegion<'a> {
    fn open(shared: &'a PoolShared, tasks: u32) -> Self {
        let threads = shared.ranges.len() as u64;
        let mut first = 0;
        for (range, i) in shared.ranges.iter().zip(1..) {
            // At most `tasks`, so it fits 32 bits.
            let end = (u64::from(tasks) * i / threads) as u32;
            range.set(first, end);
            first = end;
        }
        // Releases `job` and the ranges to the workers that enter.
        shared.gate.store(OPEN, Ordering::Release);
        shared.announce();
        Self(shared)
    }
}

impl Drop for ParallelRegion<'_> {
    fn drop(&mut self) {
        self.0.gate.fetch_and(!OPEN, Ordering::AcqRel);
        // Acquires the writes of the workers.
        wait_while(|| self.0.gate.load(Ordering::Acquire) != 0);
    }
}

/// Spins, then yields. There is no sleep, because the wait is short.
fn wait_while(condition: impl Fn() -> bool) {
    let mut started = None;
    while condition() {
        if elapsed(&mut started) < SPIN {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

fn elapsed(started: &mut Option<Instant>) -> Duration {
    started.get_or_insert_with(Instant::now).elapsed()
}

impl PoolShared {
    /// Wakes the workers for a new region, or to stop.
    fn announce(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        // A worker adds itself to the sleepers before it reads the generation for the last time, in the same
        // total order: either the worker sees the new generation, or this thread sees the sleeper.
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.sleep.lock());
            self.wake.notify_all();
        }
    }

    /// Runs tasks, those of `thread` first, until none are left; returns how many it ran.
    fn take_tasks(&self, task: &PoolTask<'_>, thread: usize) -> u32 {
        let mut taken = 0;
        while let Some(i) = self.ranges[thread].take(false) {
            task(i);
            taken += 1;
        }
        while let Some(most) = self.ranges.iter().max_by_key(|range| range.left()) {
            match most.take(true) {
                Some(i) => {
                    task(i);
                    taken += 1;
                }
                None if most.left() == 0 => break,
                None => {}
            }
        }
        taken
    }

    /// The loop of worker `thread`, which ends when the pool is dropped.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_change(seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if !self.enter() {
                continue;
            }
            // SAFETY: this thread is inside the gate: `job` was written before it entered and is not written
            // again until it leaves.
            let job = unsafe { *self.job.get() };
            if let Some(task) = job.task {
                // SAFETY: the target lives as long as the region is open or a worker is inside.
                let task = unsafe { &*task };
                let result = catch_unwind(AssertUnwindSafe(|| self.take_tasks(task, thread)));
                if let Err(panic) = result
                    && let Ok(mut first) = self.panic.lock()
                {
                    first.get_or_insert(panic);
                }
            }
            self.gate.fetch_sub(1, Ordering::Release);
        }
    }

    /// Enters the region; false if it is over.
    fn enter(&self) -> bool {
        let inside = |gate: u32| (gate & OPEN != 0).then_some(gate + 1);
        self.gate.fetch_update(Ordering::Acquire, Ordering::Relaxed, inside).is_ok()
    }

    /// Waits for a generation other than `seen`: spins, then yields, then sleeps.
    fn wait_for_change(&self, seen: u32) -> u32 {
        let mut started = None;
        loop {
            // Reading the clock takes longer than reading the generation.
            for _ in 0..64 {
                let now = self.generation.load(Ordering::SeqCst);
                if now != seen {
                    return now;
                }
                std::hint::spin_loop();
            }
            let waited = elapsed(&mut started);
            if waited > YIELD {
                break;
            }
            if waited > SPIN {
                std::thread::yield_now();
            }
        }
        let Ok(mut guard) = self.sleep.lock() else { return seen };
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.generation.load(Ordering::SeqCst) == seen {
            match self.wake.wait(guard) {
                Ok(woken) => guard = woken,
                Err(_) => break,
            }
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        self.generation.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn add_one(count: &AtomicUsize) {
        count.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn pieces_cover_every_part_once() {
        let pool = Pool::new(2).unwrap();
        let (mut a, mut b, mut c) = (vec![0; 10], vec![0; 0], vec![0; 7]);
        pool.run_parts([&mut a, &mut b, &mut c], 4, |part, first, piece| {
            assert!(piece.len() <= 4 && part != 1);
            for (i, v) in piece.iter_mut().enumerate() {
                *v += 100 * part + first + i;
            }
        });
        assert_eq!(a, (0..10).collect::<Vec<_>>());
        assert_eq!(c, (200..207).collect::<Vec<_>>());
    }

    #[test]
    fn every_task_runs_once_with_and_without_pauses() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for round in 0..300 {
                let counts: Vec<AtomicUsize> = (0..round % 40).map(|_| 0.into()).collect();
                pool.run(counts.len(), |i| add_one(&counts[i]));
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{round}");
                if round % 100 == 0 {
                    std::thread::sleep(2 * YIELD);
                }
            }
        }
    }

    #[test]
    fn nested_and_concurrent_regions_run_on_their_caller() {
        let pool = Pool::new(3).unwrap();
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(8, |_| pool.run(2, |_| add_one(&count)));
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 4 * 50 * 8 * 2);
    }

    #[test]
    fn a_late_worker_is_skipped_for_a_while() {
        let pool = Pool::new(2).unwrap();
        let caller = std::thread::current().id();
        let is_caller = || std::thread::current().id() == caller;
        let began = AtomicBool::new(false);
        pool.run(2, |_| {
            if is_caller() {
                while !began.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            } else {
                began.store(true, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        let others = || {
            let count = AtomicUsize::new(0);
            pool.run(20, |_| {
                std::thread::sleep(Duration::from_micros(100));
                if !is_caller() {
                    add_one(&count);
                }
            });
            count.into_inner()
        };
        assert_eq!(others(), 0, "alone");
        std::thread::sleep(SERIAL_LIMIT);
        let again = Instant::now();
        while others() == 0 {
            assert!(again.elapsed() < Duration::from_secs(60), "never again together");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_still_works() {
        let pool = Pool::new(2).unwrap();
        for bad in [0, 7] {
            let run = || pool.run(8, |i| assert!(i != bad, "task {i}"));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            let count = AtomicUsize::new(0);
            pool.run(8, |_| add_one(&count));
            assert_eq!(count.into_inner(), 8);
        }
    }
}
