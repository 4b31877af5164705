//! The weights of a decoder layer, by role.

use stb_format::arch::{Linear, LinearInput, LinearMap, NormSite, Role, TensorSpec};

use crate::sublayer::Sublayer;
use crate::weights::Weight;

/// The weights of one decoder layer: matrices `M`, [out, in], and norm weights `V`. Every backend
/// has its own `M` and `V`. Gradients use this type too.
#[derive(Clone, Debug)]
pub struct Layer<M = Weight, V = Vec<f32>> {
    linears: LinearMap<M>,
    norms: Vec<(NormSite, V)>,
}

impl<M, V> Default for Layer<M, V> {
    fn default() -> Self {
        Self { linears: LinearMap::default(), norms: Vec::new() }
    }
}

impl<M, V> Layer<M, V> {
    /// Builds a layer: `matrix` loads the linear layers and `vector` the norms among `tensors`.
    ///
    /// # Errors
    /// Errors of `matrix` and `vector`.
    pub fn load<E>(
        tensors: impl Iterator<Item = TensorSpec>,
        mut matrix: impl FnMut(&TensorSpec) -> Result<M, E>,
        mut vector: impl FnMut(&TensorSpec) -> Result<V, E>,
    ) -> Result<Self, E> {
        let (mut linears, mut norms) = (Vec::new(), Vec::new());
        for tensor in tensors {
            match tensor.role {
                Role::Linear(linear) => linears.push((linear, matrix(&tensor)?)),
                Role::Norm(site) => norms.push((site, vector(&tensor)?)),
                // `crate::model` rejects blocks with other tensors.
                _ => {}
            }
        }
        Ok(Self { linears: linears.into_iter().collect(), norms })
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

    /// The weight of a norm.
    ///
    /// # Panics
    /// If the decoder layer does not have it.
    #[must_use]
    pub fn norm(&self, site: NormSite) -> &V {
        let found = self.norms.iter().find(|(s, _)| *s == site);
        found.map(|(_, norm)| norm).expect("a norm of the block")
    }

    /// Mutable form of [`Layer::norm`].
    ///
    /// # Panics
    /// If the decoder layer does not have it.
    pub fn norm_mut(&mut self, site: NormSite) -> &mut V {
        let found = self.norms.iter_mut().find(|(s, _)| *s == site);
        found.map(|(_, norm)| norm).expect("a norm of the block")
    }

    /// The weights of all norms, in the order of the tensors.
    pub fn norms(&self) -> impl ExactSizeIterator<Item = (NormSite, &V)> {
        self.norms.iter().map(|(site, norm)| (*site, norm))
    }

    /// Mutable form of [`Layer::norms`].
    pub fn norms_mut(&mut self) -> impl ExactSizeIterator<Item = (NormSite, &mut V)> {
        self.norms.iter_mut().map(|(site, norm)| (*site, norm))
    }

    /// A layer with only the weights of `sublayer`.
    #[must_use]
    pub fn part(&self, sublayer: Sublayer) -> Self
    where
        M: Clone,
        V: Clone,
    {
        let linears = self.linears.iter().filter(|(l, _)| Sublayer::of(l.input()) == sublayer);
        let norms = self.norms.iter().filter(|(site, _)| Sublayer::of_norm(*site) == sublayer);
        Self {
            linears: linears.map(|(linear, m)| (linear, m.clone())).collect(),
            norms: norms.cloned().collect(),
        }
    }

    /// Converts each matrix with `matrix` and each norm weight with `vector`.
    pub fn map<M2, V2>(
        &self,
        matrix: impl FnMut(Linear, &M) -> M2,
        mut vector: impl FnMut(NormSite, &V) -> V2,
    ) -> Layer<M2, V2> {
        Layer {
            linears: self.linears.map(matrix),
            norms: self.norms.iter().map(|(site, norm)| (*site, vector(*site, norm))).collect(),
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
        let norms = self.norms.iter().map(|(site, norm)| Ok((*site, vector(norm)?)));
        Ok(Layer {
            linears: linears.collect::<Result<_, E>>()?,
            norms: norms.collect::<Result<_, E>>()?,
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
