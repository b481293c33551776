//! Free list of activation buffers. While the backward goes down the blocks, what forward kept for one block makes
//! room for the gradients of the next.

use crate::ops::{Device, Element};

/// Free buffers of any length.
pub(super) struct Pool<D: Device> {
    free: Vec<D::Buffer>,
}

impl<D: Device> Pool<D> {
    pub fn new() -> Self {
        Pool { free: Vec::new() }
    }

    /// The smallest free buffer that has room for `len` elements, or a new one. What it holds is not defined. Of several, it is the
    /// one that lies first, whenever they came: so that each pass has the buffers of the one before.
    pub fn take(&mut self, device: &D, element: Element, len: usize) -> D::Buffer {
        self.free.sort_unstable_by_key(|b| device.address(b));
        let capacities: Vec<usize> = self.free.iter().map(|b| device.capacity(b)).collect();
        let Some(at) = best_fit(&capacities, len * device.width(element)) else { return device.zeros_of(element, len) };
        let mut buffer = self.free.remove(at);
        device.resize_in_place(&mut buffer, element, len);
        buffer
    }

    pub fn give(&mut self, buffer: D::Buffer) {
        self.free.push(buffer);
    }

    pub fn clear(&mut self) {
        self.free.clear();
    }
}

/// Which of the free buffers, by their bytes, serves where so many are needed.
pub(super) fn best_fit(capacities: &[usize], needed: usize) -> Option<usize> {
    let fitting = capacities.iter().enumerate().filter(|(_, room)| **room >= needed);
    fitting.min_by_key(|(_, room)| **room).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Cpu;

    #[test]
    fn the_smallest_buffer_that_is_long_enough_serves() {
        let mut pool = Pool::<Cpu>::new();
        let given = [vec![1.0; 10], vec![2.0; 7], vec![3.0; 4]];
        let places = given.each_ref().map(|b| b.as_ptr());
        given.into_iter().for_each(|b| pool.give(b));
        let taken = [5, 4, 11, 8].map(|len| pool.take(&Cpu, Element::F32, len));
        assert_eq!(taken.each_ref().map(Vec::len), [5, 4, 11, 8]);
        assert_eq!([taken[0].as_ptr(), taken[1].as_ptr(), taken[3].as_ptr()], [places[1], places[2], places[0]]);
        // Shortened, it still has room for what it was made for.
        let [five, ..] = taken;
        pool.give(five);
        let seven = pool.take(&Cpu, Element::F32, 7);
        assert_eq!(seven.as_ptr(), places[1]);
    }
}
