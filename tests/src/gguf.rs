//! Writes GGUF files.

/// A GGUF file to be written.
#[derive(Clone, Debug, Default)]
pub struct GgufBuilder {
    entries: Vec<u8>,
    entry_count: u64,
    tensors: Vec<BuiltTensor>,
}

/// A tensor of a file to be written.
#[derive(Clone, Debug)]
pub struct BuiltTensor {
    /// The name.
    pub name: String,
    /// The dimensions in PyTorch order.
    pub shape: Vec<u64>,
    /// The id of the type.
    pub kind: u32,
    /// The stored bytes.
    pub bytes: Vec<u8>,
}

const ALIGNMENT: usize = 32;

impl GgufBuilder {
    /// Adds a metadata entry of type `kind` with the bytes of its value.
    pub fn entry(&mut self, key: &str, kind: u32, value: &[u8]) {
        push_text(&mut self.entries, key);
        self.entries.extend(kind.to_le_bytes());
        self.entries.extend(value);
        self.entry_count += 1;
    }

    /// Adds an integer of 32 bits.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.entry(key, 4, &value.to_le_bytes());
    }

    /// Adds a number of 32 bits.
    pub fn f32(&mut self, key: &str, value: f32) {
        self.entry(key, 6, &value.to_le_bytes());
    }

    /// Adds a text.
    pub fn text(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        push_text(&mut bytes, value);
        self.entry(key, 8, &bytes);
    }

    /// Adds a tensor.
    pub fn tensor(&mut self, tensor: BuiltTensor) {
        self.tensors.push(tensor);
    }

    /// The bytes of the file.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend(self.entry_count.to_le_bytes());
        file.extend(&self.entries);
        let mut data = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
            push_text(&mut file, &tensor.name);
            file.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|d| file.extend(d.to_le_bytes()));
            file.extend(tensor.kind.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
        }
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(data);
        file
    }
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// Blocks of type Q8_0 (id 8) for `values`, whose number is a multiple of 32.
#[must_use]
pub fn q8_0(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for block in values.chunks_exact(32) {
        let largest = block.iter().fold(0f32, |most, v| most.max(v.abs()));
        let scale = stb_format::half::f16::from_f32(largest / 127.0);
        bytes.extend(scale.to_le_bytes());
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        bytes.extend(block.iter().map(|v| ((v * inverse).round() as i8).to_le_bytes()[0]));
    }
    bytes
}
