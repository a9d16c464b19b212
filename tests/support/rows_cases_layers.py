"""The op-by-op cases of layers: images (4, 8, 8), sequences (5, 8), losses, and what couples the samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selbp import ops
from support.rows_cases import F64, Function, Lambda, N, Own, _ramp

_down = nn.Sequential
IMAGES: dict[str, Function] = {
    "conv2d": nn.Conv2d(4, 6, 3),
    "conv2d_no_bias": nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False),
    "conv2d_groups": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "conv2d_dilated": nn.Conv2d(4, 6, 3, dilation=2),
    "conv2d_circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "conv2d_1x1": nn.Conv2d(4, 6, 1),
    "conv_transpose2d": nn.ConvTranspose2d(4, 6, 3, 2),
    "conv2d_channels_last": _down(
        nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), nn.ReLU(), nn.Conv2d(6, 6, 3)
    ),
    "conv3d": Lambda(lambda x, m: m(x.unsqueeze(2)), m=nn.Conv3d(4, 3, (1, 3, 3))),
    "conv_weight_norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 3)),
    "conv_spectral_norm": nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 5, 3)),
    "group_norm": nn.GroupNorm(2, 4),
    "group_norm_no_affine": nn.GroupNorm(2, 4, affine=False),
    "instance_norm": nn.InstanceNorm2d(4, affine=True),
    "instance_norm_plain": nn.InstanceNorm2d(4),
    "batch_norm_eval": nn.BatchNorm2d(4).eval(),
    "layer_norm_image": nn.LayerNorm([4, 8, 8]),
    "layer_norm_channels": Lambda(lambda x, m: m(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), m=nn.LayerNorm(4)),
    "max_pool": nn.MaxPool2d(2),
    "avg_pool": nn.AvgPool2d(2),
    "avg_pool_stride": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "lp_pool": nn.LPPool2d(2.0, 2),
    "adaptive_avg_pool_1": nn.AdaptiveAvgPool2d(1),
    "adaptive_avg_pool_1_channels_last": lambda x: F.adaptive_avg_pool2d(x.to(memory_format=torch.channels_last), 1),
    "adaptive_avg_pool_1_permuted": lambda x: F.adaptive_avg_pool2d(x.permute(0, 2, 3, 1).sin().permute(0, 3, 1, 2), 1),
    "as_strided_windows": lambda x: x.contiguous().as_strided((N, 4, 4, 4), (256, 64, 8, 1), 0) * 2,
    "adaptive_avg_pool_3": nn.AdaptiveAvgPool2d(3),
    "adaptive_max_pool": nn.AdaptiveMaxPool2d(2),
    "max_pool_1d": lambda x: F.max_pool1d(x.flatten(2), 4),
    "avg_pool_1d": lambda x: F.avg_pool1d(x.flatten(2), 4),
    "upsample": nn.Upsample(scale_factor=2),
    "upsample_bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "upsample_bicubic": nn.Upsample(scale_factor=2, mode="bicubic"),
    "upsample_linear": lambda x: F.interpolate(x.flatten(2), size=70, mode="linear"),
    "upsample_exact": nn.Upsample(scale_factor=2, mode="nearest-exact"),
    "upsample_antialias": lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True),
    "reflection_pad": nn.ReflectionPad2d(1),
    "replication_pad": nn.ReplicationPad2d(1),
    "zero_pad": nn.ZeroPad2d(1),
    "pixel_shuffle": nn.PixelShuffle(2),
    "pixel_unshuffle": nn.PixelUnshuffle(2),
    "channel_shuffle": nn.ChannelShuffle(2),
    "unfold": nn.Unfold(3),
    "fold": lambda x: F.fold(x.view(N, 16, 16), (5, 5), (2, 2)),
    # A single image, whose channels are the samples.
    "unfold_samples": lambda x: F.unfold(x[:, 0], 2, stride=2).reshape(len(x), -1),
    "fold_samples": lambda x: F.fold(x[..., :2].reshape(-1, 16), (8, 8), 2, stride=2),
    "pixel_shuffle_samples": lambda x: F.pixel_shuffle(x.flatten(0, 1), 2),
    "pixel_unshuffle_samples": lambda x: F.pixel_unshuffle(x[:, 0], 2).reshape(len(x), -1),
    "dropout2d": nn.Dropout2d(0.3),
    "local_response_norm": nn.LocalResponseNorm(2),
    "conv1d": Own(lambda x, p: F.conv1d(x.flatten(2), p), 3, 4, 3),
    "grid_sample": lambda x: F.grid_sample(x, _ramp(N, 3, 3, 2) / 40, align_corners=False),
    "affine_grid": lambda x: F.grid_sample(x, F.affine_grid(x[:, 0, :2, :3], [N, 4, 3, 3], False), align_corners=False),
    "softmax2d": nn.Softmax2d(),
    "squeeze_excite": Own(lambda x, p: x * torch.sigmoid(x.mean((2, 3)) @ p)[:, :, None, None], 4, 4),
    "height_first": lambda x: x.permute(2, 0, 1, 3).reshape(8, -1).sum(0).view(N, -1),
    "windows": lambda x: (
        x.view(N, 4, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(N * 4, 16, 4).softmax(1).view(N, -1)
    ),
    "shifted_windows": lambda x: x.roll((1, 1), (2, 3)).view(N, 4, 2, 4, 8).transpose(2, 3).flatten(1) * _ramp(256),
    "patches": lambda x: x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(N * 4, -1).softmax(1),
}


class _Attention(nn.Module):
    def __init__(self, batch_first: bool, weights: bool = False, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=batch_first, dropout=dropout)
        self.first, self.weights, self.causal = batch_first, weights, causal

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype) if self.causal else None
        out = self.m(x, x, x, need_weights=self.weights, attn_mask=mask, is_causal=self.causal)[0]
        return out if self.first else out.transpose(0, 1)


def _sdpa(**options: object) -> Function:
    return lambda x: F.scaled_dot_product_attention(x[:, None] * 2, x[:, None], x[:, None], **options)  # type: ignore[arg-type]


def _layer(**options: object) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, **options)  # type: ignore[arg-type]


_first = lambda x, m: m(x)[0]  # noqa: E731
_heads = Own(
    lambda x, p: (
        F.scaled_dot_product_attention(*(x @ p).view(N, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0), is_causal=True)
        .transpose(1, 2)
        .reshape(N, 5, 8)
    ),
    8,
    24,
)

SEQUENCES: dict[str, Function] = {
    "linear_3d": nn.Linear(8, 5),
    "layer_norm_3d": nn.LayerNorm(8),
    "attention": _Attention(True),
    "attention_steps_first": _Attention(False),
    "attention_weights": _Attention(True, weights=True),
    "attention_dropout": _Attention(True, dropout=0.2),
    "attention_causal": _Attention(True, causal=True),
    "attention_qkv": _heads,
    "encoder_layer": _layer(dropout=0.0, batch_first=True),
    "encoder_layer_dropout": _layer(dropout=0.1, batch_first=True),
    "encoder_layer_steps_first": Lambda(lambda x, m: m(x.transpose(0, 1)).transpose(0, 1), m=_layer(dropout=0.0)),
    "decoder_layer": Lambda(
        lambda x, m: m(x, x * 2), m=nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    ),
    "lstm": Lambda(_first, m=nn.LSTM(8, 7, batch_first=True)),
    "lstm_two_layers": Lambda(_first, m=nn.LSTM(8, 7, num_layers=2, bidirectional=True, batch_first=True)),
    "lstm_steps_first": Lambda(lambda x, m: m(x.transpose(0, 1))[0].transpose(0, 1), m=nn.LSTM(8, 7)),
    "gru": Lambda(_first, m=nn.GRU(8, 7, batch_first=True)),
    "rnn": Lambda(_first, m=nn.RNN(8, 7, batch_first=True)),
    "lstm_cell": Lambda(lambda x, m: m(x[:, 1], m(x[:, 0]))[0], m=nn.LSTMCell(8, 7)),
    "gru_cell": Lambda(lambda x, m: m(x[:, 1], m(x[:, 0])), m=nn.GRUCell(8, 7)),
    "embedding": Lambda(lambda x, m: x + m((x.detach()[..., 0] * 3).long().clamp(0, 8)), m=nn.Embedding(9, 8)),
    "embedding_padding": Lambda(
        lambda x, m: x + m((x.detach()[..., 0] * 3).long().clamp(0, 8)), m=nn.Embedding(9, 8, padding_idx=0)
    ),
    "table_lookup": Own(lambda x, p: x + p[(x.detach()[..., 0] * 3).long().clamp(0, 8)], 9, 8),
    "table_lookup_2d": Own(lambda x, p: x + p[(x.detach() > 0).long(), (x.detach() * 2).long().clamp(0, 3)], 2, 4),
    "positions": Own(lambda x, p: (x + p) * p[:1], 5, 8),
    "class_token": Own(lambda x, p: torch.cat([p.expand(N, -1, -1), x], 1)[:, 0] * x.sum(1), 1, 1, 8),
    "rotary": lambda x: x * _ramp(5, 8).cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * _ramp(5, 8).sin(),
    "sdpa": _sdpa(),
    "sdpa_causal": _sdpa(is_causal=True),
    "sdpa_dropout": _sdpa(dropout_p=0.2),
    "sdpa_mask": _sdpa(attn_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()),
    "sdpa_mask_by_sample": _sdpa(attn_mask=_ramp(N, 1, 5, 5)),
    "sdpa_learned_bias": Own(lambda x, p: F.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=p), 5, 5),
    "attention_by_hand": lambda x: (x @ x.mT / 8**0.5).softmax(-1) @ x,
    "conv_over_steps": Own(lambda x, p: F.conv1d(x.transpose(1, 2), p), 3, 8, 3),
    "per_step_loss": lambda x: F.cross_entropy(
        x[:, :-1].reshape(-1, 8), torch.arange(4 * N) % 8, reduction="none"
    ).view(N, 4),
    "cumulative_steps": lambda x: x.cumsum(1),
    "last_step": lambda x: x[:, -1],
    "masked_mean": lambda x: (x * (_ramp(N, 5, 1) > 3)).sum(1) / 3,
    "grouped_heads": lambda x: x.view(N, 5, 2, 1, 4).expand(N, 5, 2, 3, 4).reshape(N, 5, 24),
}

_y = torch.tensor([0, 1, 2, 3, 0, 1])
_p = (_ramp(N, 8) * 7).sin().sigmoid()
_head = (_ramp(5, 8) * 3).cos()
LOSSES: dict[str, Function] = {
    "cross_entropy": lambda o: F.cross_entropy(o, _y, reduction="none"),
    "cross_entropy_smoothed": lambda o: F.cross_entropy(o, _y, reduction="none", label_smoothing=0.1),
    "cross_entropy_weighted": lambda o: F.cross_entropy(o, _y, weight=_ramp(8), reduction="none"),
    "cross_entropy_ignored": lambda o: F.cross_entropy(o, _y, ignore_index=2, reduction="none"),
    "cross_entropy_soft": lambda o: F.cross_entropy(o, _p.softmax(1), reduction="none"),
    "cross_entropy_pixels": lambda o: F.cross_entropy(
        o.view(N, 2, 2, 2), (_p.view(N, 2, 4)[:, 0].view(N, 2, 2) > 0.5).long(), reduction="none"
    ).sum((1, 2)),
    "bce_logits": lambda o: F.binary_cross_entropy_with_logits(o, _p, reduction="none").mean(1),
    "bce": lambda o: F.binary_cross_entropy(o.sigmoid(), _p, reduction="none").sum(1),
    "mse": lambda o: F.mse_loss(o, _p, reduction="none").mean(1),
    "huber": lambda o: F.huber_loss(o, _p, reduction="none").sum(1),
    "smooth_l1": lambda o: F.smooth_l1_loss(o, _p, reduction="none").sum(1),
    "l1": lambda o: F.l1_loss(o, _p, reduction="none").sum(1),
    "nll": lambda o: F.nll_loss(o.log_softmax(1), _y, reduction="none"),
    "kl": lambda o: F.kl_div(o.log_softmax(1), _p.softmax(1), reduction="none").sum(1),
    "gaussian_nll": lambda o: F.gaussian_nll_loss(o, _p, o * o + 1, reduction="none").sum(1),
    "poisson_nll": lambda o: F.poisson_nll_loss(o, _p, reduction="none").sum(1),
    "gathered_log_prob": lambda o: -o.log_softmax(1).gather(1, _y[:, None]).squeeze(1),
    "soft_margin": lambda o: F.soft_margin_loss(o, _p.sign(), reduction="none").sum(1),
    "hinge": lambda o: F.hinge_embedding_loss(o, _p.sign(), reduction="none").sum(1),
    "multi_margin": lambda o: F.multi_margin_loss(o, _y, reduction="none"),
    "multilabel_margin": lambda o: F.multilabel_soft_margin_loss(o, (_p > 0.5).double(), reduction="none"),
    "linear_cross_entropy": lambda o: ops.linear_cross_entropy(o, _head.to(o), None, _y),
    "linear_cross_entropy_skip": lambda o: ops.linear_cross_entropy(o, _head.to(o), None, _y, skip_mass=0.3),
    "linear_cross_entropy_tokens": lambda o: (
        ops.linear_cross_entropy(o.reshape(2 * N, -1), _head[:, : o.shape[1] // 2].to(o), None, _y.repeat(2))
        .view(N, 2)
        .sum(1)
    ),
    "triplet": lambda o: F.triplet_margin_loss(o, o.flip(1), o * o, reduction="none"),
}

COUPLED: dict[str, Function] = {
    "batch_norm": nn.BatchNorm1d(8),
    "batch_mean": lambda x: x - x.mean(0),
    "batch_softmax": lambda x: x.softmax(0),
    "total": lambda x: x * x.sum(),
    "contrastive": lambda x: F.log_softmax(x @ x.t(), 1),
    "roll_samples": lambda x: x.roll(1, 0),
    "sort_samples": lambda x: x.sort(0)[0],
    "cumsum_samples": lambda x: x.cumsum(0),
    "flip_samples": lambda x: x.flip(0),
    "half_the_samples": lambda x: torch.cat([x[:3] * 2, x[3:]]),
    "one_sample": lambda x: x * x[0],
    "picked_samples": lambda x: x[[5, 4, 3, 3, 1, 0]],
    "split_samples": lambda x: x.view(2, 3, 8).softmax(1).view(N, 8),
    "frequency_embedding": Lambda(
        lambda x, m: x + m(x.detach()[:, 0].long().clamp(0, 8)), m=nn.Embedding(9, 8, scale_grad_by_freq=True)
    ),
    "all_true_mask": lambda x: x.sin()[x.detach().isfinite().all(1)],
    "masked_select": lambda x: torch.zeros(N, 8, dtype=F64).masked_scatter(x.detach() > 0, x[x.detach() > 0]),
}
