//! Sums of gradients over all processes, begun while the backward pass still runs.

use crate::{
    collective::{Collective, Pending},
    error::Result,
    model::Param,
    ops::Device,
};

/// Bytes of gradients that travel together: few enough that the first leave early, enough that latencies count little
/// (PyTorch's DistributedDataParallel takes as many).
const BUCKET: usize = 25 << 20;

/// The sums of one update.
pub(super) struct Buckets<'a, D: Device> {
    collective: &'a dyn Collective<D>,
    /// Gradients that wait for more, and the places of their parameters.
    places: Vec<usize>,
    gradients: Vec<D::Buffer>,
    bytes: usize,
    /// On their way.
    pending: Vec<(Vec<usize>, Pending<D>)>,
}

impl<'a, D: Device> Buckets<'a, D> {
    pub fn new(collective: &'a dyn Collective<D>) -> Self {
        Buckets { collective, places: Vec::new(), gradients: Vec::new(), bytes: 0, pending: Vec::new() }
    }

    /// Takes the gradients at these places, which are complete.
    pub fn take(&mut self, device: &D, params: &mut [Param<D>], ready: &[usize]) {
        for &place in ready {
            let Some(gradient) = params[place].grad.take() else { continue };
            self.bytes += size_of::<f32>() * device.len(&gradient);
            self.gradients.push(gradient);
            self.places.push(place);
            if self.bytes >= BUCKET {
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
