//! Runs the CUDA kernels of `kernels/cuda` on the host: compiles them with the system's C++
//! compiler and `kernels/cuda/emulator.h`, and runs them in a process of its own.

use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs, thread};

/// The result of building or running a program; the error is text.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A program with kernels.
#[derive(Debug)]
pub struct Emulator {
    program: PathBuf,
}

/// A kernel, its grid and its arguments.
#[derive(Clone, Debug)]
pub struct Launch {
    kernel: String,
    grid: [u64; 3],
    block: [u64; 3],
    shared: u64,
    arguments: Vec<Vec<Piece>>,
}

/// Part of an argument.
#[derive(Clone, Debug)]
pub enum Piece {
    /// A number. Its length is its alignment.
    Bytes(Vec<u8>),
    /// The address of a byte of a buffer.
    Pointer {
        /// Number of the buffer.
        buffer: usize,
        /// Bytes from its start.
        offset: usize,
    },
    /// A null pointer.
    Null,
}

impl Launch {
    /// A launch of one block of one thread, without shared memory and arguments.
    #[must_use]
    pub fn new(kernel: &str) -> Self {
        let kernel = kernel.to_owned();
        Self { kernel, grid: [1; 3], block: [1; 3], shared: 0, arguments: Vec::new() }
    }

    /// Blocks of the grid.
    #[must_use]
    pub fn grid(mut self, x: usize, y: usize, z: usize) -> Self {
        self.grid = [x, y, z].map(|v| v as u64);
        self
    }

    /// Threads of a block.
    #[must_use]
    pub fn block(mut self, x: usize, y: usize, z: usize) -> Self {
        self.block = [x, y, z].map(|v| v as u64);
        self
    }

    /// Bytes of dynamic shared memory.
    #[must_use]
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes as u64;
        self
    }

    /// An argument made of pieces: a struct, by value.
    #[must_use]
    pub fn pieces(mut self, pieces: Vec<Piece>) -> Self {
        self.arguments.push(pieces);
        self
    }

    /// A pointer to the start of a buffer.
    #[must_use]
    pub fn buffer(self, buffer: usize) -> Self {
        self.pointer(buffer, 0)
    }

    /// A pointer into a buffer.
    #[must_use]
    pub fn pointer(self, buffer: usize, offset: usize) -> Self {
        self.pieces(vec![Piece::Pointer { buffer, offset }])
    }

    /// A null pointer.
    #[must_use]
    pub fn null(self) -> Self {
        self.pieces(vec![Piece::Null])
    }

    /// A number of 32 bits, signed or not.
    #[must_use]
    pub fn u32(self, v: u32) -> Self {
        self.pieces(vec![Piece::Bytes(v.to_le_bytes().to_vec())])
    }

    /// A number of 64 bits.
    #[must_use]
    pub fn u64(self, v: u64) -> Self {
        self.pieces(vec![Piece::Bytes(v.to_le_bytes().to_vec())])
    }

    /// A float.
    #[must_use]
    pub fn f32(self, v: f32) -> Self {
        self.u32(v.to_bits())
    }
}

impl Emulator {
    /// Compiles `kernels`, functions in `sources` (files of `kernels/cuda`), with `defines`
    /// (`NAME=VALUE`). Without a C++ compiler it returns `None` and prints a line that says so, unless
    /// `STB_REQUIRE_CXX` is set.
    ///
    /// # Errors
    /// The output of the compiler if it fails.
    pub fn build(sources: &[&str], kernels: &[&str], defines: &[String]) -> Result<Option<Self>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/cuda");
        let mut main = String::new();
        for source in sources {
            writeln!(main, "#include \"{}\"", folder.join(source).display())?;
        }
        main.push_str("int main() { return emulator::run({\n");
        for kernel in kernels {
            writeln!(main, "    STB_EMULATED_KERNEL({kernel}),")?;
        }
        main.push_str("}); }\n");

        let compiler = env::var_os("CXX").unwrap_or_else(|| "c++".into());
        if Command::new(&compiler).arg("--version").output().is_err() {
            if env::var_os("STB_REQUIRE_CXX").is_some() {
                return Err("no C++ compiler, and STB_REQUIRE_CXX is set".into());
            }
            let mut out = std::io::stderr();
            writeln!(out, "skipped: no C++ compiler (CXX or c++) to emulate CUDA kernels with")?;
            return Ok(None);
        }
        let mut flags: Vec<String> = "-x c++ -std=c++17 -O1 -g1 -fno-omit-frame-pointer -ffp-contract=off \
            -fsanitize=address,alignment,bounds,shift,integer-divide-by-zero,null -fno-sanitize-recover=all \
            -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-unused-function -Wno-unused-parameter -Wno-unused-variable -Wno-psabi \
            -Wno-sign-compare"
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        flags.extend(defines.iter().map(|d| format!("-D{d}")));

        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        fs::create_dir_all(&target)?;
        let name = hash(&folder, &main, &flags, sources)?;
        let program = target.join(&name);
        if !program.exists() {
            // Tests of one process and several processes may build the same program at once: each builds
            // in a folder of its own, and the last to finish replaces the same bytes.
            let folder_of_build = tempfile::tempdir_in(&target)?;
            let unfinished = folder_of_build.path().join(&name);
            let mut child = Command::new(&compiler)
                .args(&flags)
                .arg("-I")
                .arg(&folder)
                .arg("-include")
                .arg(folder.join("emulator.h"))
                .arg("-")
                .arg("-o")
                .arg(&unfinished)
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .map_err(|e| format!("the C++ compiler: {e}"))?;
            child.stdin.take().ok_or("its input")?.write_all(main.as_bytes())?;
            let done = child.wait_with_output()?;
            if !done.status.success() {
                let said = text(&done.stderr);
                return Err(format!("the C++ compiler refuses {sources:?}:\n{said}").into());
            }
            fs::rename(&unfinished, &program)?;
        }
        Ok(Some(Self { program }))
    }

    /// Runs the launches, one after another, and returns the buffers. The run is repeated for each of `seeds`
    /// (0: threads in order; others: random order), which must give the same result.
    ///
    /// # Errors
    /// If a kernel misuses memory, barriers or operations of a warp, or if results differ.
    pub fn run(
        &self,
        buffers: &[Vec<u8>],
        launches: &[Launch],
        seeds: &[u64],
    ) -> Result<Vec<Vec<u8>>> {
        let mut first: Option<Vec<Vec<u8>>> = None;
        for &seed in seeds {
            let found = self.run_once(buffers, launches, seed)?;
            if let Some(first) = &first {
                let differ = first.iter().zip(&found).position(|(a, b)| a != b);
                if let Some(buffer) = differ {
                    return Err(format!(
                        "a race: buffer {buffer} depends on the order of threads (seed {seed})"
                    )
                    .into());
                }
            } else {
                first = Some(found);
            }
        }
        first.ok_or_else(|| "at least one seed".into())
    }

    fn run_once(
        &self,
        buffers: &[Vec<u8>],
        launches: &[Launch],
        seed: u64,
    ) -> Result<Vec<Vec<u8>>> {
        let input = request(buffers, launches, seed);
        let mut child = Command::new(&self.program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Fibers end without returning.
            .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
            .spawn()?;
        let mut stdin = child.stdin.take().ok_or("its input")?;
        // The program may end early; its output then has the error.
        let writer = thread::spawn(move || drop(stdin.write_all(&input)));
        let done = child.wait_with_output()?;
        writer.join().expect("writing does not panic");
        if !done.status.success() {
            return Err(format!("seed {seed}: {}: {}", done.status, text(&done.stderr)).into());
        }
        let mut rest = done.stdout.as_slice();
        let mut out = Vec::new();
        for buffer in buffers {
            let too_little = "the emulator returned too little";
            let (head, tail) = rest.split_at_checked(buffer.len()).ok_or(too_little)?;
            out.push(head.to_vec());
            rest = tail;
        }
        Ok(out)
    }
}

fn text(bytes: &[u8]) -> String {
    let all = String::from_utf8_lossy(bytes);
    all.lines().take(60).collect::<Vec<_>>().join("\n")
}

/// A hash of everything that the program depends on.
fn hash(folder: &Path, main: &str, flags: &[String], sources: &[&str]) -> Result<String> {
    let mut hash = DefaultHasher::new();
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    files.extend(sources.iter().map(|s| folder.join(s)));
    files.sort();
    for file in files.iter().filter(|f| f.is_file()) {
        fs::read(file)?.hash(&mut hash);
    }
    (main, flags).hash(&mut hash);
    Ok(format!("{:016x}", hash.finish()))
}

fn request(buffers: &[Vec<u8>], launches: &[Launch], seed: u64) -> Vec<u8> {
    let mut out = Vec::new();
    let mut put = |v: u64, bytes: &[u8]| {
        out.extend_from_slice(&v.to_le_bytes());
        out.extend_from_slice(bytes);
    };
    put(seed, &[]);
    put(buffers.len() as u64, &[]);
    for buffer in buffers {
        put(buffer.len() as u64, buffer);
    }
    put(launches.len() as u64, &[]);
    for launch in launches {
        put(launch.kernel.len() as u64, launch.kernel.as_bytes());
        for v in launch.grid.into_iter().chain(launch.block).chain([launch.shared]) {
            put(v, &[]);
        }
        put(launch.arguments.len() as u64, &[]);
        for pieces in &launch.arguments {
            put(pieces.len() as u64, &[]);
            for piece in pieces {
                match piece {
                    Piece::Bytes(bytes) => {
                        put(0, &[]);
                        put(bytes.len() as u64, bytes);
                    }
                    Piece::Pointer { buffer, offset } => {
                        put(1, &[]);
                        put(*buffer as u64, &(*offset as u64).to_le_bytes());
                    }
                    Piece::Null => {
                        put(1, &[]);
                        put(u64::MAX, &0u64.to_le_bytes());
                    }
                }
            }
        }
    }
    out
}

/// The bytes of floats, little-endian.
#[must_use]
pub fn bytes_of(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Floats from bytes, little-endian; an incomplete last one is dropped.
#[must_use]
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
