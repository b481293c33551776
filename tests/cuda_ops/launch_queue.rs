//! Requests that are deferred: those that make no graph of each other, and other threads.

use crate::common::cuda_emulator::open;
use relora_kit::ops::{Device, LaunchQueue, Mat, MatMut};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

#[test]
fn lists_that_differ_are_not_taken_for_each_other() {
    let device = open();
    let mut early = Some(device.upload(&[100.0; 40]));
    assert!(device.begin_capture(), "graphs need a driver of CUDA 12.3 or newer");
    let (mut x_is, mut y_is) = (3.0, 5.0);
    let [mut x, mut y] = [x_is, y_is].map(|value| device.upload(&[value; 40]));
    // The same until it is a graph; then other extents, another factor, another filling, another place, other arguments.
    let same = (5, 2.0, 7.0, false, 1.0);
    let others = [(4, 2.0, 7.0, false, 1.0), (5, 3.0, 7.0, false, 1.0), (5, 2.0, 8.0, false, 1.0)];
    let rest = [same, (5, 2.0, 7.0, true, 1.0), (5, 2.0, 7.0, true, 1.0), (5, 2.0, 7.0, false, 4.0), same, same];
    for (round, (n, alpha, value, swap, scale)) in [same; 4].into_iter().chain(others).chain(rest).enumerate() {
        if swap {
            std::mem::swap(&mut x, &mut y);
            std::mem::swap(&mut x_is, &mut y_is);
        }
        let [mut product, mut copy] = [device.zeros(16), device.zeros(40)];
        device.matmul(alpha, Mat::new(&x, 4, n), Mat::new(&y, n, 4), 0.0, MatMut::new(&mut product, 4, 4));
        device.copy(&x, &mut copy);
        device.axpy(scale, &y, &mut copy);
        let mut copy_is = x_is + scale * y_is;
        if let Some(early) = early.take_if(|_| round == 8) {
            device.axpy(1.0, &early, &mut copy);
            copy_is += 100.0;
        }
        device.fill(&mut x, value);
        device.flush();
        assert_eq!(device.read(&product), [n as f32 * alpha * x_is * y_is; 16], "round {round}");
        assert_eq!(device.read(&copy), [copy_is; 40], "round {round}");
        x_is = value;
        assert_eq!(device.read(&x), [x_is; 40], "round {round}");
    }
    device.end_capture();
}

#[test]
fn threads_that_share_a_gpu_keep_what_they_ask_for_when_one_holds_back() {
    let device = open();
    let mut sum = device.zeros(4);
    let (mut asked, mut sum_is, done) = (0, 0.0, AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                device.begin_capture();
                device.end_capture();
                std::thread::yield_now();
            }
        });
        let end = Instant::now() + Duration::from_millis(500);
        // Sums of whole numbers below 2^24 are exact.
        while Instant::now() < end && sum_is < 16e6 {
            let value = (asked % 7) as f32;
            device.axpy(1.0, &device.upload(&[value; 4]), &mut sum);
            (asked, sum_is) = (asked + 1, sum_is + value);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(device.read(&sum), [sum_is; 4], "after {asked} requests");
}
