"""Every script on a device that is only pretended: what CUDA would refuse or wait for is seen without a GPU.

Its tensors say "meta", but hold CPU data. An operation on tensors of both devices raises, as on CUDA, and
what would make a program wait for a GPU is noted. All is computed on the CPU, so results are the same bits.
"""

import contextlib

import pytest
import torch
from torch.optim import adam, optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from test_scripts import assert_same_bits, read, short

pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta")
DEVICE = torch.device("meta")
INDEXES = {"index", "index_put_", "_index_put_impl_"}  # these may take an index that is on the CPU
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}


class Far(torch.Tensor):
    """A tensor on the pretended device; `near` holds its data, on the CPU."""

    @staticmethod
    def __new__(cls, near):
        form = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(cls, near.shape, device=DEVICE, **form)
        far.near = near
        return far

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """Run an operation on the CPU data of its tensors; the result is on the device where it would be."""
    name = operation._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    near = [tensor for tensor in tensors if not isinstance(tensor, Far) and tensor.dim() > 0]
    may_mix = name in ("_to_copy", "copy_") or (name in INDEXES and isinstance(args[0], Far))
    if far and near and not may_mix:
        raise RuntimeError(f"{name}: tensors on two devices")
    target = kwargs.get("device") or (DEVICE if far else torch.device("cpu"))
    to_far = torch.device(target).type == DEVICE.type
    leaves_far = far and (not to_far or (name == "copy_" and not isinstance(args[0], Far)))
    by_mask = name in INDEXES and any(t.dtype in (torch.bool, torch.uint8) for t in far[1:])
    if far and (name in WAITS or leaves_far or by_mask):
        Pretend.waits.append(name)
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda leaf: leaf.near if isinstance(leaf, Far) else leaf, (args, kwargs))
    result = operation(*args, **kwargs)
    if name == "_to_copy" and result.data_ptr() == args[0].data_ptr():
        result = result.clone()  # a copy on another device is one
    known = {id(tensor.near): tensor for tensor in far}  # what is changed in place stays what it is
    if name in ("copy_", "_local_scalar_dense") or not to_far:
        return tensors[0] if name == "copy_" else result
    return tree_map(lambda leaf: known.get(id(leaf), Far(leaf)) if torch.is_tensor(leaf) else leaf, result)


class Pretend(TorchDispatchMode):
    """Within it, the device is there; `waits` names what a program would have waited for."""

    waits = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


@contextlib.contextmanager
def pretend():
    """The device is there: fused optimisers take it, and checkpoints hold its data."""
    save, autocast = torch.save, torch.autocast
    to_near = lambda leaf: leaf.near.clone() if isinstance(leaf, Far) else leaf  # noqa: E731
    with pytest.MonkeyPatch.context() as patch, Pretend():
        patch.setattr(torch, "save", lambda content, path: save(tree_map(to_near, content), path))
        patch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))
        for module in adam, optimizer, _foreach_utils:
            if hasattr(module, "_get_fused_kernels_supported_devices"):
                patch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def train_far(script, *flags):
    """main on the device, where no step may wait, and all metrics stay."""

    def watched(**arguments):
        Pretend.waits.clear()
        metrics = train_step(**arguments)
        assert not Pretend.waits, "the step waits for the device"
        assert {value.device for value in metrics.values()} == {DEVICE}
        return metrics

    train_step = script.train_step
    with pretend(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_step", watched)
        script.main([str(flag) for flag in [*flags, "--device", "meta"]])


def test_a_run_on_a_device_is_the_run_on_the_cpu(trained, tmp_path, no_plots):
    """Begun there, it goes on here, and the other way round; what it draws there is what it draws here."""
    script, whole = trained
    train_far(script, *short(script.SCRIPT, tmp_path / "far", "--epochs", 1))
    script.main(["--resume", str(tmp_path / "far/checkpoint.pt"), "--epochs", "2", "--device", "cpu"])
    script.main(short(script.SCRIPT, tmp_path / "near", "--epochs", 1))
    train_far(script, "--resume", tmp_path / "near/checkpoint.pt", "--epochs", 2)
    for name in "far", "near":
        assert_same_bits(read(tmp_path / name / "checkpoint.pt"), read(whole / "checkpoint.pt"))

    flags = ["--generate", "3", "--checkpoint", str(whole / "checkpoint.pt"), "--out-dir"]
    script.main([*flags, str(tmp_path / "here"), "--device", "cpu"])
    with pretend():
        script.main([*flags, str(tmp_path / "there"), "--device", "meta"])
    here, there = ([*sorted((tmp_path / name).rglob("*.*"))] for name in ("here", "there"))
    assert [path.read_bytes() for path in here] == [path.read_bytes() for path in there]


def test_the_pretended_device_refuses_what_cuda_would():
    with pretend():
        far, near = torch.ones(3, device="meta"), torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            far + near
        Pretend.waits.clear()
        assert torch.equal((far + 1).cpu(), near + 1)
        assert (far[0].item(), far[far > 0].shape) == (1, (3,))
        assert Pretend.waits == ["_to_copy", "_local_scalar_dense", "index"]


def test_convolutions_are_channels_last_but_never_on_mps(script, monkeypatch):
    """PyTorch's batch normalisation of such tensors is wrong on mps: issues 175189 and 175190."""
    seen, args = [], script.parse_args(["--device", "cpu"])
    to = lambda network, device, memory_format=None: seen.append((device, memory_format)) or network  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "to", to)
    for args.device in "cuda:1", "mps":
        script.build(args)
    assert {device for device, _ in seen} == {"cuda:1", "mps"}
    assert ("mps", torch.channels_last) not in seen
    plain = "vanilla_gan", "gan_2d", "cyclegan"  # no convolutions; instance normalisation is slower with it
    assert (("cuda:1", torch.channels_last) in seen) == (script.SCRIPT not in plain)
