//! Roles of tensors, and maps by linear layer or linear input.

/// A linear layer of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Linear {
    /// Queries, [heads · head_dim, hidden].
    Q,
    /// Keys, [kv_heads · head_dim, hidden].
    K,
    /// Values, [kv_heads · head_dim, hidden].
    V,
    /// Attention output, [hidden, heads · head_dim].
    O,
    /// The gate of a gated MLP, [intermediate, hidden].
    Gate,
    /// The up projection of an MLP, [intermediate, hidden].
    Up,
    /// The down projection of an MLP, [hidden, intermediate].
    Down,
}

impl Linear {
    /// The activations that this layer reads.
    #[must_use]
    pub fn input(self) -> LinearInput {
        match self {
            Self::Q | Self::K | Self::V => LinearInput::Qkv,
            Self::O => LinearInput::AttentionOutput,
            Self::Gate | Self::Up => LinearInput::GateUp,
            Self::Down => LinearInput::Down,
        }
    }

    /// A short name for messages, such as `q` or `down`.
    #[must_use]
    pub fn short_name(self) -> &'static str {
        match self {
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::O => "o",
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// The activations that linear layers of a decoder layer read, in the order of computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearInput {
    /// Input of q, k and v, [tokens, hidden].
    Qkv,
    /// Input of o, [tokens, heads · head_dim].
    AttentionOutput,
    /// Input of gate and up, [tokens, hidden].
    GateUp,
    /// Input of down, [tokens, intermediate].
    Down,
}

impl LinearInput {
    /// All inputs in the order of computation.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::AttentionOutput, Self::GateUp, Self::Down];

    /// Whether the linear layer with this input adds its output to the residual stream.
    #[must_use]
    pub fn writes_residual(self) -> bool {
        matches!(self, Self::AttentionOutput | Self::Down)
    }
}

/// A norm of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NormSite {
    /// Before attention.
    Attention,
    /// After attention.
    AttentionOutput,
    /// On each head of the queries.
    Query,
    /// On each head of the keys.
    Key,
    /// Before the MLP.
    Mlp,
    /// After the MLP.
    MlpOutput,
    /// After the last layer.
    Final,
}

/// The role of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Token embeddings.
    TokenEmbedding,
    /// Position embeddings.
    PositionEmbedding,
    /// The weight of a norm.
    Norm(NormSite),
    /// The bias of a norm.
    NormBias(NormSite),
    /// The weights of a linear layer of the decoder.
    Linear(Linear),
    /// The bias of a linear layer of the decoder.
    Bias(Linear),
    /// The projection of token embeddings to the residual stream, [hidden, embedding].
    ProjectIn,
    /// The projection of the residual stream to the input of the lm_head, [embedding, hidden].
    ProjectOut,
    /// The router of a mixture of experts, [experts, hidden].
    Router,
    /// The weights of a linear layer of one expert.
    Expert(u32, Linear),
    /// The lm_head, which maps hidden states to logits.
    LmHead,
}

/// A tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name in the file (spec, metadata §2.2).
    pub name: String,
    /// The dimensions in PyTorch order.
    pub shape: Vec<u64>,
    /// The index of the decoder layer, if the tensor belongs to one.
    pub layer: Option<usize>,
    /// The role of the tensor.
    pub role: Role,
}

impl TensorSpec {
    /// The linear layer, if the tensor is the weight matrix of one.
    #[must_use]
    pub fn linear(&self) -> Option<Linear> {
        match self.role {
            Role::Linear(linear) => Some(linear),
            _ => None,
        }
    }
}

/// One value for each [`LinearInput`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputMap<T> {
    attention: T,
    attention_output: T,
    mlp: T,
    mlp_down: T,
}

impl<T> InputMap<T> {
    /// A map with the values of `f`.
    pub fn from_fn(mut f: impl FnMut(LinearInput) -> T) -> Self {
        Self {
            attention: f(LinearInput::Qkv),
            attention_output: f(LinearInput::AttentionOutput),
            mlp: f(LinearInput::GateUp),
            mlp_down: f(LinearInput::Down),
        }
    }

    /// Like [`InputMap::from_fn`], but stops at the first error.
    ///
    /// # Errors
    /// Errors of `f`.
    pub fn try_from_fn<E>(mut f: impl FnMut(LinearInput) -> Result<T, E>) -> Result<Self, E> {
        Ok(Self {
            attention: f(LinearInput::Qkv)?,
            attention_output: f(LinearInput::AttentionOutput)?,
            mlp: f(LinearInput::GateUp)?,
            mlp_down: f(LinearInput::Down)?,
        })
    }

    /// Applies `f` to each value.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> InputMap<U> {
        InputMap {
            attention: f(self.attention),
            attention_output: f(self.attention_output),
            mlp: f(self.mlp),
            mlp_down: f(self.mlp_down),
        }
    }

    /// The owned values in the order of [`LinearInput::ALL`].
    #[must_use]
    pub fn into_entries(self) -> Vec<(LinearInput, T)> {
        let values = [self.attention, self.attention_output, self.mlp, self.mlp_down];
        LinearInput::ALL.into_iter().zip(values).collect()
    }

    /// Mutable form of [`InputMap::iter`].
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (LinearInput, &mut T)> {
        let Self { attention, attention_output, mlp, mlp_down } = self;
        LinearInput::ALL.into_iter().zip([attention, attention_output, mlp, mlp_down])
    }

    /// The values in the order of [`LinearInput::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (LinearInput, &T)> {
        LinearInput::ALL.into_iter().map(|input| (input, &self[input]))
    }
}

impl<T> std::ops::Index<LinearInput> for InputMap<T> {
    type Output = T;

    fn index(&self, input: LinearInput) -> &T {
        match input {
            LinearInput::Qkv => &self.attention,
            LinearInput::AttentionOutput => &self.attention_output,
            LinearInput::GateUp => &self.mlp,
            LinearInput::Down => &self.mlp_down,
        }
    }
}

impl<T> std::ops::IndexMut<LinearInput> for InputMap<T> {
    fn index_mut(&mut self, input: LinearInput) -> &mut T {
        match input {
            LinearInput::Qkv => &mut self.attention,
            LinearInput::AttentionOutput => &mut self.attention_output,
            LinearInput::GateUp => &mut self.mlp,
            LinearInput::Down => &mut self.mlp_down,
        }
    }
}

/// A value for each linear layer that a decoder layer has, in the order of its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearMap<T>(Vec<(Linear, T)>);

impl<T> Default for LinearMap<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> LinearMap<T> {
    /// The value of `linear`, if there is one.
    #[must_use]
    pub fn get(&self, linear: Linear) -> Option<&T> {
        self.0.iter().find(|(l, _)| *l == linear).map(|(_, value)| value)
    }

    /// Mutable form of [`LinearMap::get`].
    pub fn get_mut(&mut self, linear: Linear) -> Option<&mut T> {
        self.0.iter_mut().find(|(l, _)| *l == linear).map(|(_, value)| value)
    }

    /// All values, in the order of the tensors.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Linear, &T)> {
        self.0.iter().map(|(linear, value)| (*linear, value))
    }

    /// Mutable form of [`LinearMap::iter`].
    pub fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = (Linear, &mut T)> {
        self.0.iter_mut().map(|(linear, value)| (*linear, value))
    }

    /// Applies `f` to each value.
    pub fn map<U>(&self, mut f: impl FnMut(Linear, &T) -> U) -> LinearMap<U> {
        self.iter().map(|(linear, value)| (linear, f(linear, value))).collect()
    }
}

impl<T> FromIterator<(Linear, T)> for LinearMap<T> {
    fn from_iter<I: IntoIterator<Item = (Linear, T)>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}
