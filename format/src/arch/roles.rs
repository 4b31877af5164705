//! What tensors do, and maps by linear layer or by its input.

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
    /// The first matrix of an MLP, [intermediate, hidden].
    Up,
    /// The last matrix of an MLP, [hidden, intermediate].
    Down,
}

impl Linear {
    /// The activations that this layer reads.
    #[must_use]
    pub fn input(self) -> LinearInput {
        match self {
            Self::Q | Self::K | Self::V => LinearInput::Attention,
            Self::O => LinearInput::AttentionOutput,
            Self::Gate | Self::Up => LinearInput::Mlp,
            Self::Down => LinearInput::MlpDown,
        }
    }

    /// Its short name in messages: `q`, `down`.
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
    /// What q, k and v read: [tokens, hidden].
    Attention,
    /// What o reads: [tokens, heads · head_dim].
    AttentionOutput,
    /// What gate and up read: [tokens, hidden].
    Mlp,
    /// What down reads: [tokens, intermediate].
    MlpDown,
}

impl LinearInput {
    /// All inputs in the order of computation.
    pub const ALL: [Self; 4] = [Self::Attention, Self::AttentionOutput, Self::Mlp, Self::MlpDown];

    /// Whether the linear layer behind this input adds its output to the residual stream.
    #[must_use]
    pub fn writes_residual(self) -> bool {
        matches!(self, Self::AttentionOutput | Self::MlpDown)
    }
}

/// A norm of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NormSite {
    /// Before attention.
    Attention,
    /// Behind attention.
    AttentionOutput,
    /// Each head of the queries.
    Query,
    /// Each head of the keys.
    Key,
    /// Before the MLP.
    Mlp,
    /// Behind the MLP.
    MlpOutput,
    /// Behind the last layer.
    Final,
}

/// What a tensor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Embeddings of tokens.
    TokenEmbedding,
    /// Embeddings of positions.
    PositionEmbedding,
    /// The weight of a norm.
    Norm(NormSite),
    /// The bias of a norm.
    NormBias(NormSite),
    /// The weights of a linear layer of the decoder.
    Linear(Linear),
    /// The bias of a linear layer of the decoder.
    Bias(Linear),
    /// The router of a mixture of experts, [experts, hidden].
    Router,
    /// The weights of a linear layer of one expert.
    Expert(u32, Linear),
    /// The matrix that turns hidden states into logits.
    LmHead,
}

/// A tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in a file, which is that of the Hugging Face checkpoint.
    pub name: String,
    /// Its shape in PyTorch's order.
    pub shape: Vec<u64>,
    /// The decoder layer, if it belongs to one.
    pub layer: Option<usize>,
    /// What it does.
    pub role: Role,
}

impl TensorSpec {
    /// The linear layer whose weights it holds, if it does.
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
    /// The value that `f` gives for each input.
    pub fn from_fn(mut f: impl FnMut(LinearInput) -> T) -> Self {
        Self {
            attention: f(LinearInput::Attention),
            attention_output: f(LinearInput::AttentionOutput),
            mlp: f(LinearInput::Mlp),
            mlp_down: f(LinearInput::MlpDown),
        }
    }

    /// As [`InputMap::from_fn`], up to the first error.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn try_from_fn<E>(mut f: impl FnMut(LinearInput) -> Result<T, E>) -> Result<Self, E> {
        Ok(Self {
            attention: f(LinearInput::Attention)?,
            attention_output: f(LinearInput::AttentionOutput)?,
            mlp: f(LinearInput::Mlp)?,
            mlp_down: f(LinearInput::MlpDown)?,
        })
    }

    /// A map with the results of `f`.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> InputMap<U> {
        InputMap {
            attention: f(self.attention),
            attention_output: f(self.attention_output),
            mlp: f(self.mlp),
            mlp_down: f(self.mlp_down),
        }
    }

    /// The values in the order of [`LinearInput::ALL`], by themselves.
    #[must_use]
    pub fn into_entries(self) -> Vec<(LinearInput, T)> {
        let values = [self.attention, self.attention_output, self.mlp, self.mlp_down];
        LinearInput::ALL.into_iter().zip(values).collect()
    }

    /// The values in the order of [`LinearInput::ALL`], to change them.
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
            LinearInput::Attention => &self.attention,
            LinearInput::AttentionOutput => &self.attention_output,
            LinearInput::Mlp => &self.mlp,
            LinearInput::MlpDown => &self.mlp_down,
        }
    }
}

impl<T> std::ops::IndexMut<LinearInput> for InputMap<T> {
    fn index_mut(&mut self, input: LinearInput) -> &mut T {
        match input {
            LinearInput::Attention => &mut self.attention,
            LinearInput::AttentionOutput => &mut self.attention_output,
            LinearInput::Mlp => &mut self.mlp,
            LinearInput::MlpDown => &mut self.mlp_down,
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

    /// As [`LinearMap::get`], to change it.
    pub fn get_mut(&mut self, linear: Linear) -> Option<&mut T> {
        self.0.iter_mut().find(|(l, _)| *l == linear).map(|(_, value)| value)
    }

    /// All values.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Linear, &T)> {
        self.0.iter().map(|(linear, value)| (*linear, value))
    }

    /// All values, to change them.
    pub fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = (Linear, &mut T)> {
        self.0.iter_mut().map(|(linear, value)| (*linear, value))
    }

    /// A map with the results of `f`.
    pub fn map<U>(&self, mut f: impl FnMut(Linear, &T) -> U) -> LinearMap<U> {
        self.iter().map(|(linear, value)| (linear, f(linear, value))).collect()
    }
}

impl<T> FromIterator<(Linear, T)> for LinearMap<T> {
    fn from_iter<I: IntoIterator<Item = (Linear, T)>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}
