//! Densities by decree: masks with exact numbers of ones in place of what the activations say.

use relufy_spec::DecoderSpec;
use relufy_spec::flops::SiteDensities;

use crate::source::mix;

/// Masks for every layer.
pub(crate) struct Forced {
    layers: Vec<Masks>,
    densities: SiteDensities,
    draws: u64,
}

/// Ones where a non-zero is put, in one layer.
pub(crate) struct Masks {
    pub qkv: Vec<f32>,
    pub up: Vec<f32>,
    pub gate: Vec<f32>,
}

impl Forced {
    /// The first masks of such densities.
    pub fn new(spec: &DecoderSpec, densities: SiteDensities, seed: u64) -> Forced {
        let layers = spec.layers.iter().map(|layer| Masks {
            qkv: vec![0.0; spec.hidden],
            up: vec![0.0; spec.hidden],
            gate: vec![0.0; layer.mlp.ffn],
        });
        let mut forced = Forced { layers: layers.collect(), densities, draws: mix(seed) };
        forced.draw();
        forced
    }

    /// Other masks, for the next token.
    pub fn draw(&mut self) {
        let SiteDensities { qkv, up, down, .. } = self.densities;
        for masks in &mut self.layers {
            for (mask, density) in
                [(&mut masks.qkv, qkv), (&mut masks.up, up), (&mut masks.gate, down)]
            {
                choose(mask, density, &mut self.draws);
            }
        }
    }

    pub fn layer(&self, n: usize) -> Option<&Masks> {
        self.layers.get(n)
    }
}

/// Ones at a random choice of places, as many as the density says (Fisher and Yates' shuffle).
pub(crate) fn choose(mask: &mut [f32], density: f64, draws: &mut u64) {
    let ones = ((mask.len() as f64 * density).round() as usize).min(mask.len());
    mask.fill(0.0);
    mask[..ones].fill(1.0);
    for i in 0..mask.len() {
        *draws = draws.wrapping_add(1);
        let rest = (mask.len() - i) as u64;
        mask.swap(i, i + (mix(*draws) % rest) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_exactly_as_many_ones() {
        let (mut mask, mut draws) = (vec![0.0; 5632], 1);
        for density in [0.0, 0.05, 0.35, 0.5, 1.0] {
            choose(&mut mask, density, &mut draws);
            let ones = mask.iter().filter(|one| **one == 1.0).count();
            assert_eq!(ones, (5632.0 * density).round() as usize);
            assert_eq!(mask.iter().filter(|zero| **zero == 0.0).count(), 5632 - ones);
        }
    }
}
