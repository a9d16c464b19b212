"""Steps with parameters: layers, products, attention, recurrent networks, images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.random_models.context import Context, step, table


# ---------------------------------------------------------------------------------------------------------- products
@step("any")
def linear(c: Context, x: Tensor) -> Tensor:
    bias = c.pick("bias", [True, False])
    return F.linear(x, c.param(4, x.shape[-1]), c.param(4) if bias else None)


@step("vector")
def product(c: Context, x: Tensor) -> Tensor:
    d = x.shape[1]
    how = c.pick(
        "how", ["mm", "addmm", "left", "mv", "addmv", "bilinear", "vdot", "weight_t", "outer", "chain", "tensordot"]
    )
    if how == "mm":
        return torch.mm(x, c.param(d, 4))
    if how == "addmm":
        return torch.addmm(c.param(4), x, c.param(d, 4), beta=0.5, alpha=2.0)
    if how == "left":
        return (c.param(4, d) @ x.t()).t()
    if how == "mv":
        return torch.mv(x, c.param(d))[:, None] * x
    if how == "addmv":
        return torch.addmv(c.param(1), x, c.param(d)).unsqueeze(1) + x
    if how == "bilinear":
        return F.bilinear(x, x.sin(), c.param(3, d, d), c.param(3))
    if how == "vdot":
        p = c.param(d)
        return x * torch.dot(p, p) + torch.outer(x[:, 0], p)
    if how == "weight_t":
        return F.linear(x, c.param(d, 4).t())
    if how == "outer":
        return (x.unsqueeze(2) @ x.unsqueeze(1)).flatten(1)[:, : 2 * d] * 0.3
    if how == "chain":
        return torch.linalg.multi_dot([x, c.param(d, 3), c.param(3, 4)])
    return torch.tensordot(
        x.view(len(x), 2, d // 2) if x.is_contiguous() else x.unflatten(1, (2, -1)),
        c.param(3, 2, d // 2),
        dims=([1, 2], [1, 2]),
    )


EINSUMS = {
    "btd,de->bte": (4,),
    "btd,tde->bte": (),
    "btd,etd->be": (),
    "btd,bsd->bts": None,
    "btd,bse->bde": None,
    "btd,td->bt": (),
    "btd->bd": None,
    "btd->tbd": None,
    "btd,b->btd": None,
}


@step("sequence")
def einsum(c: Context, x: Tensor) -> Tensor:
    form = c.pick("form", EINSUMS)
    t, d = x.shape[1:]
    sizes = {"t": t, "d": d, "e": 4}
    operands = [x]
    if "," in form:
        letters = form.split("->")[0].split(",")[1]
        if letters == "b":
            operands.append(x.mean((1, 2)))
        elif letters[0] == "b":
            operands.append(c.earlier(x).cos())
        else:
            operands.append(c.param(*(sizes[letter] for letter in letters)))
    out = torch.einsum(form, *operands) * 0.5
    return out.transpose(0, 1) if form.endswith("tbd") else out


@step("sequence")
def batched(c: Context, x: Tensor) -> Tensor:
    n, t, d = x.shape
    how = c.pick("how", ["bmm", "baddbmm", "shared_left", "shared_right", "per_step", "mT", "heads", "four"])
    if how == "bmm":
        return torch.bmm(x, c.earlier(x).transpose(1, 2)) * 0.4
    if how == "baddbmm":
        return torch.baddbmm(x, x @ x.mT, x, alpha=0.2)
    if how == "shared_left":
        return c.param(3, t) @ x
    if how == "shared_right":
        return x @ c.param(1, d, 4)
    if how == "per_step":
        return torch.matmul(x.unsqueeze(2), c.param(t, d, 3)).squeeze(2)
    if how == "mT":
        return (x.mT @ x).tanh() @ c.param(d, 2)
    if how == "heads":
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.matmul(q, c.param(2, d // 2, d // 2)).transpose(1, 2).reshape(n, t, d)
    return torch.bmm(c.param(t, 3, d), x.permute(1, 2, 0)).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------------ normalisation
@step("any")
def layer_norm(c: Context, x: Tensor) -> Tensor:
    over = x.shape[1:] if c.chance(0.4) else x.shape[-1:]
    how = c.pick("how", ["layer", "layer_plain", "rms", "rms_plain", "layer_no_bias"])
    if how == "layer":
        return F.layer_norm(x, over, c.param(*over), c.param(*over), eps=1e-2)
    if how == "layer_no_bias":
        return F.layer_norm(x, over, c.param(*over), eps=1e-2)
    if how == "layer_plain":
        return F.layer_norm(x, over, eps=1e-2)
    return F.rms_norm(x, over, c.param(*over) if how == "rms" else None, eps=1e-2)


@step("image")
def image_norm(c: Context, x: Tensor) -> Tensor:
    channels = x.shape[1]
    layers = {
        "group": lambda: nn.GroupNorm(2, channels, eps=1e-2),
        "group_plain": lambda: nn.GroupNorm(2, channels, affine=False, eps=1e-2),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=True, eps=1e-2),
        "instance_plain": lambda: nn.InstanceNorm2d(channels, eps=1e-2),
        "batch_eval": lambda: nn.BatchNorm2d(channels).eval(),
        "batch_eval_plain": lambda: nn.BatchNorm2d(channels, affine=False).eval(),
    }
    if c.chance(0.1):
        return F.local_response_norm(x, 2)
    return c.module(layers[c.pick("norm", layers)])(x)


@step("image")
def channels_last_norm(c: Context, x: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), c.param(x.shape[1]), eps=1e-2).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------------------- images
@step("image")
def convolution(c: Context, x: Tensor) -> Tensor:
    channels = x.shape[1]
    options = {
        "plain": lambda: nn.Conv2d(channels, 4, 3, padding=1),
        "stride": lambda: nn.Conv2d(channels, 4, 2, stride=2, bias=False),
        "depthwise": lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        "groups": lambda: nn.Conv2d(channels, 4, (1, 3), groups=2, padding="same"),
        "dilated": lambda: nn.Conv2d(channels, 4, 2, dilation=2),
        "circular": lambda: nn.Conv2d(channels, 4, 3, padding=1, padding_mode="circular"),
        "reflect": lambda: nn.Conv2d(channels, 4, 3, padding=1, padding_mode="reflect"),
        "pointwise": lambda: nn.Conv2d(channels, 4, 1),
        "transposed": lambda: nn.ConvTranspose2d(channels, 3, 2, stride=2, output_padding=1),
        "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(channels, 4, 2)),
    }
    which = c.pick("conv", options)
    if c.chance(0.3):
        c.notes.append("channels_last")
        x = x.contiguous(memory_format=torch.channels_last)
    return c.module(options[which])(x)


@step("sequence")
def convolution_1d(c: Context, x: Tensor) -> Tensor:
    x = x.transpose(1, 2) if c.chance(0.5) else x
    channels = x.shape[1]
    options = {
        "plain": lambda: nn.Conv1d(channels, 4, 2, padding=1),
        "causal": lambda: nn.Conv1d(channels, 4, 2),
        "transposed": lambda: nn.ConvTranspose1d(channels, 3, 2),
        "depthwise": lambda: nn.Conv1d(channels, channels, 3, padding=1, groups=channels),
    }
    which = c.pick("conv", options)
    return c.module(options[which])(F.pad(x, (2, 0)) if which == "causal" else x)


@step("volume")
def convolution_3d(c: Context, x: Tensor) -> Tensor:
    layers = {"conv": lambda: nn.Conv3d(2, 3, (1, 2, 2)), "transposed": lambda: nn.ConvTranspose3d(2, 1, (1, 1, 2))}
    return c.module(layers[c.pick("conv", layers)])(x).flatten(2, 3)


POOLS = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max_overlapping": lambda x: F.max_pool2d(x, 2, 1, padding=1),
    "max_unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape[2:]),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "avg_padded": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "lp": lambda x: F.lp_pool2d(x.abs() + 0.1, 2.0, 2),
    "adaptive_avg_1": lambda x: F.adaptive_avg_pool2d(x, 1) * x,
    "adaptive_avg_2": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, 2),
    "max_1d": lambda x: F.max_pool1d(x.flatten(2), 2),
    "max_1d_indices": lambda x: F.max_pool1d(x.flatten(2), 2, return_indices=True)[0],
    "avg_1d": lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1),
    "adaptive_avg_1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 3),
    "adaptive_max_1d": lambda x: F.adaptive_max_pool1d(x.flatten(2), 3),
    "max_3d": lambda x: F.max_pool3d(x.unsqueeze(2), (1, 2, 2)).squeeze(2),
    "avg_3d": lambda x: F.avg_pool3d(x.unsqueeze(1), (2, 2, 2)).squeeze(1),
    "adaptive_avg_3d": lambda x: F.adaptive_avg_pool3d(x.unsqueeze(1), (2, 2, 1)).flatten(1),
    "adaptive_max_3d": lambda x: F.adaptive_max_pool3d(x.unsqueeze(1), (2, 1, 2)).flatten(1),
    "channels_as_samples": lambda x: F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, (len(x), -1)),
}
RESIZES = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest_exact": lambda x: F.interpolate(x, size=(2, 5), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, size=(5, 4), mode="bilinear"),
    "bilinear_corners": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, size=(4, 2), mode="bicubic"),
    "antialias": lambda x: F.interpolate(x, size=(2, 2), mode="bilinear", antialias=True),
    "area": lambda x: F.interpolate(x, size=(2, 3), mode="area"),
    "linear_1d": lambda x: F.interpolate(x.flatten(2), size=7, mode="linear"),
    "nearest_1d": lambda x: F.interpolate(x.flatten(2), size=5),
    "trilinear": lambda x: F.interpolate(x.unsqueeze(2), size=(1, 3, 3), mode="trilinear").squeeze(2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[..., :2, :2], 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 2).flatten(1),
    "fold": lambda x: F.fold(x[:, :, :2, :2].reshape(len(x), 4, -1)[:, :, :4], (3, 3), 2),
    "pad_reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (1, 0, 0, 2), mode="replicate"),
    "pad_circular": lambda x: F.pad(x, (1, 1, 0, 1), mode="circular"),
    "pad_constant": lambda x: F.pad(x, (1, 0, -1, 2), value=1.0),
    "pad_replicate_3d": lambda x: F.pad(x.unsqueeze(1), (1, 0, 0, 1, 1, 0), mode="replicate").flatten(1, 2),
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].movedim(1, -1).tanh(), align_corners=False),
    "affine_grid": lambda x: F.grid_sample(
        x, F.affine_grid(x[:, 0, :2, :3].tanh(), [len(x), x.shape[1], 2, 2], False), align_corners=True
    ),
    "softmax2d": lambda x: x.softmax(1),
    "windows": lambda x: x[..., :2, :2].unfold(2, 1, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(3),
    "squeeze_excite": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "height_first": lambda x: x.permute(2, 0, 1, 3).reshape(x.shape[2], -1).sum(0).view(len(x), -1),
}
table("image", {f"pool_{name}": function for name, function in POOLS.items()})
table("image", {f"resize_{name}": function for name, function in RESIZES.items()})


@step("image")
def channels_last_resampling(c: Context, x: Tensor) -> Tensor:
    functions = {**POOLS, **RESIZES}
    return functions[c.pick("of", functions)](x.contiguous(memory_format=torch.channels_last))
