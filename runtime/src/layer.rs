//! The weights of a decoder layer, by role.

use std::sync::Arc;

use stb_format::arch::{Block, Linear, LinearInput, LinearMap, NormSite, Role, TensorSpec};

use crate::sublayer::Sublayer;
use crate::weights::Weight;

/// The weights of one decoder layer: matrices `M`, [out, in], and vectors `V`: norm weights and biases. Every
/// backend has its own `M` and `V`. Gradients use this type too.
#[derive(Clone, Debug)]
pub struct Layer<M = Weight, V = Vec<f32>> {
    /// The description of the layer.
    pub block: Arc<Block>,
    linears: LinearMap<M>,
    vectors: Vec<(LayerVector, V)>,
    router: Option<M>,
    experts: Vec<LinearMap<M>>,
}

/// A matrix of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerMatrix {
    /// The matrix of a linear layer.
    Linear(Linear),
    /// The router of a mixture of experts.
    Router,
    /// The matrix of a linear layer of an expert.
    Expert(usize, Linear),
}

impl LayerMatrix {
    /// The matrix with this role; `None` for vectors and tensors outside the decoder layers.
    #[must_use]
    pub fn of_role(role: Role) -> Option<Self> {
        match role {
            Role::Linear(linear) => Some(Self::Linear(linear)),
            Role::Router => Some(Self::Router),
            Role::Expert(expert, linear) => Some(Self::Expert(expert as usize, linear)),
            _ => None,
        }
    }
}

/// A vector of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerVector {
    /// The weight of a norm.
    Norm(NormSite),
    /// The bias of a norm.
    NormBias(NormSite),
    /// The bias of a linear layer.
    Bias(Linear),
}

impl LayerVector {
    /// The sublayer that uses the vector.
    fn sublayer(self) -> Sublayer {
        match self {
            Self::Norm(site) | Self::NormBias(site) => Sublayer::of_norm(site),
            Self::Bias(linear) => Sublayer::of(linear.input()),
        }
    }
}

impl<M, V> Layer<M, V> {
    /// Builds a layer: `matrix` loads the linear layers and `vector` the norms and biases among `tensors`.
    ///
    /// # Errors
    /// Errors of `matrix` and `vector`.
    pub fn load<E>(
        block: Block,
        tensors: impl Iterator<Item = TensorSpec>,
        mut matrix: impl FnMut(&TensorSpec) -> Result<M, E>,
        mut vector: impl FnMut(&TensorSpec) -> Result<V, E>,
    ) -> Result<Self, E> {
        let (mut linears, mut vectors, mut router) = (Vec::new(), Vec::new(), None);
        let mut experts: Vec<Vec<(Linear, M)>> = Vec::new();
        for tensor in tensors {
            match tensor.role {
                Role::Linear(linear) => linears.push((linear, matrix(&tensor)?)),
                Role::Norm(site) => vectors.push((LayerVector::Norm(site), vector(&tensor)?)),
                Role::NormBias(site) => {
                    vectors.push((LayerVector::NormBias(site), vector(&tensor)?));
                }
                Role::Bias(linear) => vectors.push((LayerVector::Bias(linear), vector(&tensor)?)),
                Role::Router => router = Some(matrix(&tensor)?),
                Role::Expert(expert, linear) => {
                    let at = expert as usize;
                    experts.resize_with(experts.len().max(at + 1), Vec::new);
                    experts[at].push((linear, matrix(&tensor)?));
                }
                // Not in a layer.
                Role::TokenEmbedding
                | Role::PositionEmbedding
                | Role::ProjectIn
                | Role::ProjectOut
                | Role::LmHead => {}
            }
        }
        Ok(Self {
            block: Arc::new(block),
            linears: linears.into_iter().collect(),
            vectors,
            router,
            experts: experts.into_iter().map(|expert| expert.into_iter().collect()).collect(),
        })
    }

    /// The matrix of a linear layer.
    ///
    /// # Panics
    /// If the decoder layer does not have it.
    #[must_use]
    pub fn linear(&self, linear: Linear) -> &M {
        self.linears.get(linear).expect("a linear layer of the block")
    }

    /// Mutable form of [`Layer::linear`].
    ///
    /// # Panics
    /// If the decoder layer does not have it.
    pub fn linear_mut(&mut self, linear: Linear) -> &mut M {
        self.linears.get_mut(linear).expect("a linear layer of the block")
    }

    /// All matrices, in the order of the tensors.
    #[must_use]
    pub fn linears(&self) -> &LinearMap<M> {
        &self.linears
    }

    /// The router of the mixture of experts, [experts, hidden], if the layer has one.
    #[must_use]
    pub fn router(&self) -> Option<&M> {
        self.router.as_ref()
    }

    /// The matrices of each expert; empty without a mixture of experts.
    #[must_use]
    pub fn experts(&self) -> &[LinearMap<M>] {
        &self.experts
    }

    /// All matrices: linear layers, router, experts.
    pub fn matrices(&self) -> impl Iterator<Item = (LayerMatrix, &M)> {
        let linears = self.linears.iter().map(|(linear, m)| (LayerMatrix::Linear(linear), m));
        let router = self.router.iter().map(|m| (LayerMatrix::Router, m));
        let experts = self.experts.iter().enumerate().flat_map(|(expert, matrices)| {
            matrices.iter().map(move |(linear, m)| (LayerMatrix::Expert(expert, linear), m))
        });
        linears.chain(router).chain(experts)
    }

    /// The matrix `key`, if the layer has it.
    #[must_use]
    pub fn matrix(&self, key: LayerMatrix) -> Option<&M> {
        match key {
            LayerMatrix::Linear(linear) => self.linears.get(linear),
            LayerMatrix::Router => self.router.as_ref(),
            LayerMatrix::Expert(expert, linear) => self.experts.get(expert)?.get(linear),
        }
    }

    /// Mutable form of [`Layer::matrix`].
    pub fn matrix_mut(&mut self, key: LayerMatrix) -> Option<&mut M> {
        match key {
            LayerMatrix::Linear(linear) => self.linears.get_mut(linear),
            LayerMatrix::Router => self.router.as_mut(),
            LayerMatrix::Expert(expert, linear) => self.experts.get_mut(expert)?.get_mut(linear),
        }
    }

    /// A vector of the layer, if the layer has it.
    #[must_use]
    pub fn vector(&self, key: LayerVector) -> Option<&V> {
        self.vectors.iter().find(|(k, _)| *k == key).map(|(_, vector)| vector)
    }

    /// Mutable form of [`Layer::vector`].
    pub fn vector_mut(&mut self, key: LayerVector) -> Option<&mut V> {
        self.vectors.iter_mut().find(|(k, _)| *k == key).map(|(_, vector)| vector)
    }

    /// The weight of a norm.
    ///
    /// # Panics
    /// If the decoder layer does not have it.
    #[must_use]
    pub fn norm(&self, site: NormSite) -> &V {
        self.vector(LayerVector::Norm(site)).expect("a norm of the block")
    }

    /// Mutable form of [`Layer::norm`].
    ///
    /// # Panics
    /// If the decoder layer does not have it.
    pub fn norm_mut(&mut self, site: NormSite) -> &mut V {
        self.vector_mut(LayerVector::Norm(site)).expect("a norm of the block")
    }

    /// All vectors, in the order of the tensors.
    pub fn vectors(&self) -> impl ExactSizeIterator<Item = (LayerVector, &V)> {
        self.vectors.iter().map(|(key, vector)| (*key, vector))
    }

    /// Mutable form of [`Layer::vectors`].
    pub fn vectors_mut(&mut self) -> impl ExactSizeIterator<Item = (LayerVector, &mut V)> {
        self.vectors.iter_mut().map(|(key, vector)| (*key, vector))
    }

    /// A layer with only the weights of `sublayer`.
    #[must_use]
    pub fn part(&self, sublayer: Sublayer) -> Self
    where
        M: Clone,
        V: Clone,
    {
        let linears = self.linears.iter().filter(|(l, _)| Sublayer::of(l.input()) == sublayer);
        let vectors = self.vectors.iter().filter(|(key, _)| key.sublayer() == sublayer);
        Self {
            block: self.block.clone(),
            linears: linears.map(|(linear, m)| (linear, m.clone())).collect(),
            vectors: vectors.cloned().collect(),
            router: self.router.clone().filter(|_| sublayer == Sublayer::Mlp),
            experts: match sublayer {
                Sublayer::Mlp => self.experts.clone(),
                Sublayer::Attention => Vec::new(),
            },
        }
    }

    /// Converts each matrix with `matrix` and each vector with `vector`.
    pub fn map<M2, V2>(
        &self,
        mut matrix: impl FnMut(LayerMatrix, &M) -> M2,
        mut vector: impl FnMut(LayerVector, &V) -> V2,
    ) -> Layer<M2, V2> {
        let mut expert = |(index, matrices): (usize, &LinearMap<M>)| {
            matrices.map(|linear, m| matrix(LayerMatrix::Expert(index, linear), m))
        };
        let experts = self.experts.iter().enumerate().map(&mut expert).collect();
        Layer {
            block: self.block.clone(),
            experts,
            linears: self.linears.map(|linear, m| matrix(LayerMatrix::Linear(linear), m)),
            vectors: self.vectors.iter().map(|(key, v)| (*key, vector(*key, v))).collect(),
            router: self.router.as_ref().map(|m| matrix(LayerMatrix::Router, m)),
        }
    }

    /// Like [`Layer::map`], but stops at the first error.
    ///
    /// # Errors
    /// Errors of `matrix` and `vector`.
    pub fn try_map<M2, V2, E>(
        &self,
        mut matrix: impl FnMut(&M) -> Result<M2, E>,
        mut vector: impl FnMut(&V) -> Result<V2, E>,
    ) -> Result<Layer<M2, V2>, E> {
        let mut map = |matrices: &LinearMap<M>| {
            let each = matrices.iter().map(|(linear, m)| Ok((linear, matrix(m)?)));
            each.collect::<Result<LinearMap<M2>, E>>()
        };
        let linears = map(&self.linears)?;
        let experts = self.experts.iter().map(map).collect::<Result<_, E>>()?;
        let vectors = self.vectors.iter().map(|(key, v)| Ok((*key, vector(v)?)));
        Ok(Layer {
            block: self.block.clone(),
            linears,
            experts,
            router: self.router.as_ref().map(&mut matrix).transpose()?,
            vectors: vectors.collect::<Result<_, E>>()?,
        })
    }
}

impl<V> Layer<Weight, V> {
    /// The number of features of the activations `input`; 0 if no linear layer reads them.
    #[must_use]
    pub fn input_width(&self, input: LinearInput) -> usize {
        let mut readers = self.linears.iter().filter(|(linear, _)| linear.input() == input);
        readers.next().map_or(0, |(_, weight)| weight.cols())
    }
}
