//! Sums of gradients over all processes, begun while the backward pass still runs.

use crate::{
    collective::{Collective, Pending},
    error::Result,
    model::Param,
    ops::Device,
};

/// Bytes of gradients that travel together: few enough that the first leave early, enough that latencies count little
/// (PyTorch's DistributedDataParallel takes as many).
pub(super) const BUCKET: usize = 25 << 20;

/// The sums of one update.
pub(super) struct Buckets<'a, D: Device> {
    collective: &'a dyn Collective<D>,
    /// Bytes after which gradients leave.
    size: usize,
    /// Gradients that wait for more, and the places of their parameters.
    places: Vec<usize>,
    gradients: Vec<D::Buffer>,
    bytes: usize,
    /// On their way.
    pending: Vec<(Vec<usize>, Pending<D>)>,
}

impl<'a, D: Device> Buckets<'a, D> {
    pub fn new(collective: &'a dyn Collective<D>, size: usize) -> Self {
        Buckets { collective, size, places: Vec::new(), gradients: Vec::new(), bytes: 0, pending: Vec::new() }
    }

    /// Takes the gradients at these places, which are complete.
    pub fn take(&mut self, device: &D, params: &mut [Param<D>], ready: &[usize]) {
        for &place in ready {
            let Some(gradient) = params[place].grad.take() else { continue };
            self.bytes += size_of::<f32>() * device.len(&gradient);
            self.gradients.push(gradient);
            self.places.push(place);
            if self.bytes >= self.size {
                self.send(device);
            }
        }
    }

    fn send(&mut self, device: &D) {
        self.bytes = 0;
        let (places, gradients) = (std::mem::take(&mut self.places), std::mem::take(&mut self.gradients));
        self.pending.push((places, self.collective.begin_all_reduce(device, gradients)));
    }

    /// Sends the rest along with `numbers`, and puts all sums where the gradients were; returns that of `numbers`.
    pub fn finish(mut self, device: &D, params: &mut [Param<D>], numbers: D::Buffer) -> Result<D::Buffer> {
        self.gradients.push(numbers);
        self.send(device);
        let mut last = None;
        for (places, pending) in self.pending {
            let mut sums = pending(device)?.into_iter();
            places.into_iter().zip(&mut sums).for_each(|(place, sum)| params[place].grad = Some(sum));
            last = sums.next();
        }
        Ok(last.unwrap_or_else(|| device.zeros(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        collective::Members,
        model::{LlamaConfig, Model},
        ops::{Cpu, StepStats},
    };
    use std::sync::Mutex;

    /// Two processes with the same gradients; notes how many buffers each sum has.
    #[derive(Default)]
    struct Twins(Mutex<Vec<usize>>);

    impl Members for Twins {
        fn rank(&self) -> usize {
            0
        }

        fn world_size(&self) -> usize {
            2
        }

        fn name(&self, rank: usize) -> String {
            format!("twin {rank}")
        }

        fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
            Ok(vec![own.to_vec(); 2])
        }
    }

    impl Collective<Cpu> for Twins {
        fn begin_all_reduce(&self, _device: &Cpu, mut buffers: Vec<Vec<f32>>) -> Pending<Cpu> {
            self.0.lock().unwrap().push(buffers.len());
            buffers.iter_mut().flatten().for_each(|x| *x *= 2.0);
            Box::new(|_| Ok(buffers))
        }

        fn broadcast(&self, _device: &Cpu, _root: usize, _buffer: &mut Vec<f32>) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn sums_begin_before_the_backward_ends_and_come_back_in_their_places() {
        let config = serde_json::json!({"model_type": "llama", "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 37,
            "tie_word_embeddings": false, "initializer_range": 0.3});
        let mut model = Model::init(Cpu, LlamaConfig::from_value(&config).unwrap(), 3).unwrap();
        let tokens: Vec<u32> = (0..30).map(|i| i * i % 37).collect();
        model.forward_backward(&tokens, 2, 15, 1.0).unwrap();
        let expected: Vec<Vec<f32>> =
            model.params().iter().map(|p| p.grad.as_ref().unwrap().iter().map(|x| 2.0 * x).collect()).collect();
        // 63 kB in all.
        let each = model.params().len() + 1;
        for (size, sums) in [(1, each..=each), (20_000, 3..=4), (usize::MAX, 1..=1)] {
            model.zero_grad();
            let twins = Twins::default();
            let mut buckets = Buckets::new(&twins, size);
            let (mut last, mut begun) = (false, 0);
            let mut ready = |device: &Cpu, params: &mut [Param<Cpu>], places: &[usize]| {
                begun = twins.0.lock().unwrap().len();
                last = places == [0];
                buckets.take(device, params, places);
            };
            model.forward_backward_then(&tokens, 2, 15, 1.0, &mut StepStats::default(), &mut ready).unwrap();
            // The embedding comes last, and most of the others have left by then.
            assert!(last && begun + 2 >= *sums.end(), "{begun} of {sums:?}");
            let (device, params) = model.device_and_params_mut();
            assert_eq!(buckets.finish(device, params, vec![3.0]).unwrap(), [6.0]);
            assert!(model.params().iter().zip(&expected).all(|(p, expected)| p.grad.as_ref() == Some(expected)));
            let sizes = twins.0.lock().unwrap();
            assert!(sums.contains(&sizes.len()) && sizes.iter().sum::<usize>() == each, "{sizes:?}");
        }
    }
}
