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
        let (mut linears, mut vectors) = (Vec::new(), Vec::new());
        for tensor in tensors {
            let key = match tensor.role {
                Role::Linear(linear) => {
                    linears.push((linear, matrix(&tensor)?));
                    continue;
                }
                Role::Norm(site) => LayerVector::Norm(site),
                Role::NormBias(site) => LayerVector::NormBias(site),
                Role::Bias(linear) => LayerVector::Bias(linear),
                // `crate::model` rejects blocks with other tensors.
                _ => continue,
            };
            vectors.push((key, vector(&tensor)?));
        }
        Ok(Self { block: Arc::new(block), linears: linears.into_iter().collect(), vectors })
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

    /// Mutable form of [`Layer::linears`].
    pub fn linears_mut(&mut self) -> &mut LinearMap<M> {
        &mut self.linears
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
        }
    }

    /// Converts each matrix with `matrix` and each vector with `vector`.
    pub fn map<M2, V2>(
        &self,
        matrix: impl FnMut(Linear, &M) -> M2,
        mut vector: impl FnMut(LayerVector, &V) -> V2,
    ) -> Layer<M2, V2> {
        Layer {
            block: self.block.clone(),
            linears: self.linears.map(matrix),
            vectors: self.vectors.iter().map(|(key, v)| (*key, vector(*key, v))).collect(),
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
        let linears = self.linears.iter().map(|(linear, m)| Ok((linear, matrix(m)?)));
        let vectors = self.vectors.iter().map(|(key, v)| Ok((*key, vector(v)?)));
        Ok(Layer {
            block: self.block.clone(),
            linears: linears.collect::<Result<_, E>>()?,
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
