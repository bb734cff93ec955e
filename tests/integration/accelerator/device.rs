//! The device itself.

use convpass_accelerator::Accelerator;
use tch::{Device, Kind, Tensor};

use crate::child;

#[test]
fn it_counts_and_does_not_mix() {
    if !child::is_alone("accelerator::device::it_counts_and_does_not_mix") {
        return;
    }
    let accelerator = Accelerator::hold();
    let device = accelerator.device();
    let on = |device| (Kind::Float, device);
    let (x, sent) = accelerator.count(|| Tensor::ones([2, 3], on(Device::Cpu)).to_device(device));
    assert_eq!((sent.sent, sent.launches(), sent.waits()), (1, 0, 1), "{sent:?}");
    let cpu = Tensor::ones([2, 3], on(Device::Cpu));
    let (_, sent) = accelerator.count(|| cpu.to_device_(device, Kind::Float, true, false));
    assert_eq!((sent.sent, sent.launches(), sent.waits()), (1, 0, 0), "{sent:?}");
    let weight = Tensor::ones([4, 3], on(device)).set_requires_grad(true);
    let (loss, forward) = accelerator.count(|| {
        let rows = x.view([3, 2]).transpose(0, 1).contiguous();
        rows.linear(&weight, None::<&Tensor>).silu().sum(Kind::Float)
    });
    let expected = [("copy_", 1), ("mm", 1), ("silu", 1), ("sum", 1)];
    let found: Vec<_> = forward.operators.iter().map(|(name, count)| (&name[..], *count)).collect();
    assert_eq!((found, forward.waits()), (expected.to_vec(), 0));
    let ((), backward) = accelerator.count(|| loss.backward());
    assert!(backward.waits() == 0 && backward.sent == 0, "{backward:?}");
    assert_eq!(backward.operators["silu_backward"], 1, "{backward:?}");
    assert_eq!(weight.grad().device(), device);
    // As on a GPU: a copy back, a value, and a shape that depends on values.
    let (sums, waits) = accelerator.count(|| {
        let cpu = weight.grad().to_device(Device::Cpu);
        let nonzero = x.nonzero().size()[0];
        (cpu.sum(Kind::Float).double_value(&[]), loss.double_value(&[]), nonzero)
    });
    assert_eq!((waits.waits(), sums.2), (3, 6), "{waits:?}");
    // A number of the CPU may be an operand, a tensor may not.
    assert!((&x + 1.0).f_add(&Tensor::from(2.0f32)).is_ok());
    for mixed in [
        x.f_add(&Tensor::ones([2, 3], on(Device::Cpu))),
        x.f_matmul(&Tensor::ones([3, 4], on(Device::Cpu))),
        x.f_index_select(0, &Tensor::from_slice(&[0i64, 1])),
    ] {
        assert!(mixed.is_err());
    }
}
