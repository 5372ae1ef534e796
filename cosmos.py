"""COSMOS: cross-modality self-distillation for vision-language pre-training (CVPR 2025, arXiv 2412.01814).

CLIP matches one vector of a picture with one vector of its caption, and in both big objects drown small ones. COSMOS
shows a student network crops: parts of the picture, and single sentences of the caption. A teacher network, a slow
average of the student, sees large crops and several sentences. Each vector of the student attends to the tokens of the
other modality, and must then tell the teacher's vectors of its own pair from those of all others. So a sentence about a
small object has to be found in the picture.

One training step. Every name in the code is defined below.

    images: 2 global (B,3,224,224), 6 local (B,3,96,96)          texts: caption 0 (B,77), the other 7 (B,T)
                     |                                                       |
    student     VisionTower, also gives                                 TextTower, also gives
                patch tokens of view 0                                  text tokens of caption 0
                     |                                                       |
               [cls] (V,B,D) ------------------ clip_loss ------------- [eot] (U,B,D)
                     |                                                       |
         text_cross(query [cls],                                 image_cross(query [eot],
                    keys text tokens) + [cls]                                keys patch tokens) + [eot]
                     |                                                       |
              image_x = h_I, Eq. 1                                    text_x = h_T, Eq. 2
                     |                                                       |
                     '----------> cosmos_loss, Eq. 6: each <-----------------'
                                  against both of the teacher's
                                               |
    teacher     an EMA copy of the student: [cls] (2,B,D) and [eot] (2,B,D) of the 2 + 2 globals, without gradient
                and without cross-attention

    out = model(images, texts)                                          # student, all views
    teacher_image, teacher_text = teacher(images[:2], texts[:2])        # teacher, globals only
    loss = clip_loss(out, model.logit_scale.exp())
    loss = loss + cosmos_loss(out, teacher_image, teacher_text, model.distill_logit_scale.exp())
    loss.backward()
    optimizer.step()
    model.clamp_scales()
    teacher.update(model, momentum)                                     # momentum is lambda: 0.999 at batch 1,024

Read it beside Section 3 of the paper. Parts 1-3 of this file are CLIP: skim them if you know it. Parts 4-7 are COSMOS.

Notation in every shape comment. Views come first, (V, B, D), and views 0 and 1 are the two globals, always.
    B pairs on this GPU     N pairs on all GPUs     V image views, 2 global + local     U captions, 2 global + local
    P patches               T text tokens, with padding     L rows of a sequence: T, P, or 1 + P with the class token
    C tower width           D joint width                   n sequences that go through a tower together
    Q rows of queries       H attention heads, d = C / H

`code≠paper:` marks a place where the paper's text says otherwise or nothing, and we follow the released code
(github.com/ExplainableML/cosmos). `model.py:274` and the like are lines of that code. `ours:` marks a
deliberate difference from it. Parameters of the towers have open_clip's names.
"""
import copy
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --- 1. Configuration ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """The sizes of a model and of its views. Raises ValueError when they do not fit together."""
    embed_dim: int = 512            # D, the joint space of images and texts
    image_size: int = 224           # side of a global view, in pixels; fixes the grid of positions
    local_image_size: int = 96      # side of a local view
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77        # T of a caption that is not cut
    vocab_size: int = 49408         # CLIP's; TextTower finds the end of a text by its id, the last
    cross_heads: int = 8            # attention heads inside C^I and C^T; 0: plain CLIP without them

    def __post_init__(self):
        for size, part in (
                ('image_size', 'patch_size'),
                ('local_image_size', 'patch_size'),
                ('vision_width', 'vision_heads'),
                ('text_width', 'text_heads'),
                ('embed_dim', 'cross_heads')):
            whole = getattr(self, size)
            divisor = getattr(self, part)
            if divisor and whole % divisor:         # cross_heads may be 0
                raise ValueError(f'{size} {whole} is no multiple of {part} {divisor}; change one of them')

    @classmethod
    def preset(cls, name, **changes):
        """A named configuration, with any field changed."""
        return replace(PRESETS[name], **changes)


PRESETS = {
    'vit-b-16': Config(),                           # the paper's main model: 152,382,466 parameters
    'vit-b-32': Config(patch_size=32),              # the other released one
    'vit-s-16': Config(embed_dim=384, vision_width=384, vision_heads=6, text_width=384, text_heads=6),
    'tiny': Config(
        embed_dim=128, image_size=64, local_image_size=32, patch_size=8,
        vision_width=192, vision_layers=4, vision_heads=3,
        text_width=128, text_layers=2, text_heads=2,
        context_length=64, cross_heads=4),
}

# --- 2. Transformer: attention, block, stack -------------------------------------------------------------------------

def attention_weights(q, k, mask=None):
    """softmax(q k^T / sqrt(d)): q (..., Q, d), k (..., L, d) -> (..., Q, L). mask is True where a key may be seen."""
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.transpose(-2, -1)                                    # (..., Q, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head attention with the parameters, names and initial values of nn.MultiheadAttention.

    Written out, because we need q, k and v themselves: for the weights that the pictures show, and for the correlative
    form of segmentation. The query may be one row, as in the last block.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # rows: query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, query, context):
        """query (n, Q, C), context (n, L, C) -> q (n, H, Q, d), k and v (n, H, L, d)."""
        C = query.shape[-1]
        if query is context:                        # self-attention: one product, not two
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weight_q, weight_kv = self.in_proj_weight.split([C, 2 * C])
            bias_q, bias_kv = self.in_proj_bias.split([C, 2 * C])
            q = F.linear(query, weight_q, bias_q)
            k, v = F.linear(context, weight_kv, bias_kv).chunk(2, dim=-1)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(self, x):
        """(n, L, C) -> (n, H, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, query, context, mask=None, csa=False):
        """query (n, Q, C) reads context (n, L, C) -> (n, Q, C). mask (Q, L) or (n, 1, Q, L), not with csa."""
        q, k, v = self.project(query, context)
        if csa:     # SCLIP: q with q, k with k. A patch attends to itself and to what looks like it
            x = (attention_weights(q, q) + attention_weights(k, k)) @ v
        elif q.device.type == 'cpu':
            x = attention_weights(q, k, mask) @ v
        else:       # the same in one kernel, on CPUs up to 5 times as slow at short lengths
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


def pick(x, row):
    """One row of each sequence: x (n, L, C), row (n,) -> (n, 1, C)."""
    return x.gather(1, row[:, None, None].expand(-1, 1, x.shape[2]))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(LN x), then x + MLP(LN x). GELU is exact, as in the released models."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=nn.GELU(),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, mask=None, row=None, csa=False):
        """x (n, L, C), mask (L, L) -> (n, L, C). With `row` (n,) only that row of each sequence is computed, (n, 1, C).

        All rows are keys and values either way, so the row equals that of the whole result.
        """
        context = query = self.ln_1(x)                                  # (n, L, C)
        if row is not None:
            x = pick(x, row)                                            # (n, 1, C)
            query = pick(context, row)                                  # (n, 1, C)
            if mask is not None:
                mask = mask[row][:, None, None]                         # (n, 1, 1, L)
        x = x + self.attn(query, context, mask, csa)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. `grad_checkpointing` saves memory: it computes activations again in the backward."""

    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.grad_checkpointing = False

    def forward(self, x, row, keep_first=0, mask=None, csa=False):
        """x (n, L, C), row (n,) -> that row of each sequence (n, C), and all rows of the first `keep_first`, or None.

        Cross-attention and encode_dense read whole sequences, of view 0 only. Of all others one row is read, so the
        last block computes only that one. The blocks before it need every row.
        """
        *blocks, last = self.resblocks
        for block in blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        if not keep_first:
            return last(x, mask, row)[:, 0], None
        tokens = last(x[:keep_first], mask, csa=csa)                    # (keep_first, L, C)
        rows = pick(tokens, row[:keep_first])                           # (keep_first, 1, C)
        if keep_first < len(x):
            others = last(x[keep_first:], mask, row[keep_first:])       # (n - keep_first, 1, C)
            rows = torch.cat([rows, others])
        return rows[:, 0], tokens


def same_size(views):
    """Neighbouring views of one size, joined: sizes 224, 224, 96, 96, 96 -> two tensors, (2 B, ...) and (3 B, ...)."""
    return [torch.cat(list(group)) for _, group in groupby(views, key=lambda view: view.shape)]


# --- 3. The two towers (CLIP) ----------------------------------------------------------------------------------------

class VisionTower(nn.Module):
    """ViT: patches and a class token in, the projected class token and the normalised patch tokens out."""

    def __init__(self, config):
        super().__init__()
        C = config.vision_width
        std = C ** -0.5
        self.patch_size = p = config.patch_size
        self.grid = config.image_size // p
        self.conv1 = nn.Conv2d(3, C, kernel_size=p, stride=p, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(C))
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + self.grid ** 2, C))
        self.ln_pre = nn.LayerNorm(C)
        self.transformer = Transformer(C, config.vision_layers, config.vision_heads)
        self.ln_post = nn.LayerNorm(C)
        self.proj = nn.Parameter(std * torch.randn(C, config.embed_dim))

    def positions(self, h, w):
        """Position embeddings for an h x w grid of patches, (1 + h*w, C): the learned grid, or bicubic from it."""
        grid = self.grid
        if h == w == grid:
            return self.positional_embedding
        cls, patches = self.positional_embedding.split([1, grid ** 2])
        patches = patches.T.unflatten(1, (grid, grid))[None]            # (1, C, grid, grid)
        # code≠paper: DINO adds 0.1 so that rounding never loses a row. This also stretches the grid a little, and the
        # released weights were trained so: without it local crops get other positions. transformer.py:646-669
        zoom = (h + 0.1) / grid, (w + 0.1) / grid
        patches = F.interpolate(patches, scale_factor=zoom, mode='bicubic')  # (1, C, h, w)
        return torch.cat([cls, patches[0].flatten(1).T])

    def embed(self, images):
        """images (n, 3, height, width) -> the class token and the patches, with their positions, (n, 1 + P, C)."""
        n, _, height, width = images.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f'an image of {height} x {width} pixels cannot be cut into patches of {p}; '
                             'resize or pad it to multiples of that')
        # Patches do not overlap, so conv1 equals a matrix product, which in bf16 on CPUs is 3 to 5 times as fast.
        patches = F.unfold(images, kernel_size=p, stride=p).transpose(1, 2)  # (n, P, 3 * p * p)
        patches = F.linear(patches, self.conv1.weight.flatten(1))       # (n, P, C)
        cls = self.class_embedding.expand(n, 1, -1)
        return torch.cat([cls, patches], dim=1) + self.positions(height // p, width // p)

    def forward(self, views, keep=False, csa=False):
        """views: list of V (B, 3, h, w) -> [cls] (V, B, D); with `keep` patch tokens of view 0 (B, P, C), else None.

        Sizes may differ between views; neighbours of one size share a pass. The tokens come after ln_post and without
        the class token: it is a query, never a key.
        """
        B = len(views[0])
        pooled = []
        tokens = None
        for images in same_size(views):
            x = self.ln_pre(self.embed(images))                         # (n, 1 + P, C)
            class_row = x.new_zeros(len(x), dtype=torch.long)
            keep_first = B if keep and not pooled else 0      # only the first group holds view 0
            cls, whole = self.transformer(x, class_row, keep_first, csa=csa)
            pooled.append(self.ln_post(cls) @ self.proj)                # (n, D)
            if keep_first:
                tokens = self.ln_post(whole[:, 1:])                     # (B, P, C)
        return torch.cat(pooled).view(len(views), B, -1), tokens


class TextTower(nn.Module):
    """Causal transformer. The end-of-text token is the first that has seen the whole caption, so it stands for it."""

    def __init__(self, config):
        super().__init__()
        C, layers = config.text_width, config.text_layers
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, C))
        self.transformer = Transformer(C, layers, config.text_heads)
        self.ln_final = nn.LayerNorm(C)
        self.text_projection = nn.Parameter(C ** -0.5 * torch.randn(C, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        residual_std = (2 * C * layers) ** -0.5
        for block in self.transformer.resblocks:                        # CLIP's scaling, as released
            nn.init.normal_(block.attn.in_proj_weight, std=C ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * C) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def forward(self, captions, keep=False):
        """captions: list of U (B, T) -> [eot] (U, B, D); with `keep` also the tokens of caption 0 (B, T, C), else None.

        Each (B, T) may have a T of its own and end behind the longest of its B texts: attention is causal, so [eot]
        never sees the padding. A text cut before its end gives a wrong [eot] without any error. The tokens of
        caption 0 are all T positions after ln_final, padding included (code≠paper: transformer.py:772-775).
        """
        B = len(captions[0])
        pooled = []
        tokens = None
        groups = same_size(captions)
        # One lookup for all captions, because the backward of each lookup fills a (vocab, C) gradient.
        embedded = self.token_embedding(torch.cat([ids.flatten() for ids in groups]))
        embedded = embedded.split([ids.numel() for ids in groups])
        for ids, x in zip(groups, embedded):
            n, T = ids.shape
            x = x.view(n, T, -1) + self.positional_embedding[:T]        # (n, T, C)
            end = ids.argmax(dim=1)                                     # it has the largest id
            keep_first = B if keep and not pooled else 0      # only the first group holds caption 0
            mask = x.new_ones(T, T, dtype=torch.bool).tril()            # sees itself and earlier tokens
            eot, whole = self.transformer(x, end, keep_first, mask)
            pooled.append(self.ln_final(eot) @ self.text_projection)    # (n, D)
            if keep_first:
                tokens = self.ln_final(whole)                           # (B, T, C)
        return torch.cat(pooled).view(len(captions), B, -1), tokens


# --- 4. Cross-attention heads ------------------------------------------------------------------ Sec. 3.2, Eq. 1-2 ---

class CrossAttention(nn.Module):
    """C^I or C^T: the [cls] or [eot] of every view pools the tokens of the other modality. One attention, no MLP.

    COSMOS.forward adds the residual of Eq. 1-2. Padding is attended to as well (code≠paper: transformer.py:210-230):
    those rows come after the end, have seen the whole caption too, and so are further summaries of it, not noise.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)

    def forward(self, query, tokens):
        """query (V, B, D), un-normalised; tokens (B, L, D) -> (V, B, D).

        Views become the query axis, so keys and values are projected once per pair, not once per view.
        """
        query = self.ln_q(query).transpose(0, 1)                        # (B, V, D)
        return self.attn(query, self.ln_k(tokens)).transpose(0, 1)

    def weights(self, query, tokens):
        """How much each token counts for a query (B, D): (B, L), averaged over heads, rows sum to 1."""
        query = self.ln_q(query)[:, None]                               # (B, 1, D)
        q, k, _ = self.attn.project(query, self.ln_k(tokens))           # (B, H, 1 or L, d)
        weights = attention_weights(q, k)                               # (B, H, 1, L)
        return weights.mean(dim=1)[:, 0]


# --- 5. The student, and its EMA teacher -------------------------------------------------------- framework figure ---

class Output(NamedTuple):
    """What the losses read, all of unit length. The cross-modal ones are None in a model without cross-attention.

    Pair b of the batch is [:, b]: all its views, and all its captions, are positives of each other.
    """
    image: torch.Tensor         # (V, B, D)  [cls]
    text: torch.Tensor          # (U, B, D)  [eot]
    image_x: torch.Tensor       # (V, B, D)  h_I, Eq. 1
    text_x: torch.Tensor        # (U, B, D)  h_T, Eq. 2


def unit(x):
    """Rows of length 1, in float32 under any autocast: half precision would shift every logit."""
    return F.normalize(x.float(), dim=-1)


class COSMOS(nn.Module):
    """Two towers, two token maps, two cross-attention heads, two learned scales. With cross_heads = 0 a plain CLIP.

    The towers are CLIP's. The token maps bring the tokens of both to width D, for the heads C^I and C^T to read. After
    training only the towers are needed: retrieval, classification and segmentation never call the heads.
    """

    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        self.config = config
        self.has_heads = config.cross_heads > 0
        self.visual = VisionTower(config)
        self.text = TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # ln(1/temperature), CLIP loss
        if self.has_heads:
            # code≠paper: the tokens pass a linear map before Eq. 1-2 (model.py:285-287, 306, 331), and L_COSMOS has a
            # scale of its own (model.py:274).
            self.image_tokens = nn.Linear(config.vision_width, D)
            self.text_tokens = nn.Linear(config.text_width, D)
            self.image_cross = CrossAttention(D, config.cross_heads)    # C^I, reads image tokens
            self.text_cross = CrossAttention(D, config.cross_heads)     # C^T, reads text tokens
            self.distill_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images, texts):
        """images: list of V (B, 3, s, s); texts: list of U (B, T), or one tensor (U, B, T) -> Output.

        Keys and values are the tokens of view 0 and of caption 0 of a pair, for the queries of all its views
        (code≠paper, which says "global crops"; model.py:370-382). Padding is read too, so caption 0 comes at full
        length. The others may be cut, see TextTower.
        """
        cls, patches = self.visual(images, keep=self.has_heads)         # (V, B, D), (B, P, C)
        eot, words = self.text(texts, keep=self.has_heads)              # (U, B, D), (B, T, C)
        if not self.has_heads:
            return Output(unit(cls), unit(eot), None, None)
        h_I = self.text_cross(cls, self.text_tokens(words)) + cls       # (V, B, D)  Eq. 1
        h_T = self.image_cross(eot, self.image_tokens(patches)) + eot   # (U, B, D)  Eq. 2
        return Output(unit(cls), unit(eot), unit(h_I), unit(h_T))

    def encode_image(self, images):
        """images (B, 3, h, w), h and w multiples of the patch -> [cls] (B, D), tokens (B, P, D), both un-normalised.

        In a plain CLIP the tokens are None: it has no map for them.
        """
        cls, patches = self.visual([images], keep=self.has_heads)
        if not self.has_heads:
            return cls[0], None
        return cls[0], self.image_tokens(patches)

    def encode_text(self, tokens):
        """tokens (B, T) -> [eot] (B, D), tokens (B, T, D), both un-normalised (tokens None in a plain CLIP)."""
        eot, words = self.text([tokens], keep=self.has_heads)
        if not self.has_heads:
            return eot[0], None
        return eot[0], self.text_tokens(words)

    def encode_dense(self, images, csa=False):
        """images (B, 3, h, w) -> (B, h/p, w/p, D): one unit vector a patch, comparable with text vectors.

        Used for segmentation. With `csa` the last block attends correlatively, as SCLIP does (transformer.py:687-764).
        """
        _, patches = self.visual([images], keep=True, csa=csa)          # (B, P, C)
        rows = images.shape[2] // self.config.patch_size
        patches = unit(patches @ self.visual.proj)                      # (B, P, D)
        return patches.unflatten(1, (rows, -1))

    def attention(self, images, tokens):
        """images (B, 3, h, w), tokens (B, T) -> weights of C^I over patches (B, P), of C^T over words (B, T).

        The caption is the query of C^I and the image that of C^T: the qualitative figure of the paper.
        """
        if not self.has_heads:
            raise ValueError('this model is a plain CLIP and has no cross-attention heads to show; use COSMOS weights')
        cls, patches = self.encode_image(images)
        eot, words = self.encode_text(tokens)
        return self.image_cross.weights(eot, patches), self.text_cross.weights(cls, words)

    def scales(self):
        """The learned logarithms of 1/temperature: L_CLIP's, and with heads L_COSMOS's."""
        return [self.logit_scale, self.distill_logit_scale] if self.has_heads else [self.logit_scale]

    @torch.no_grad()
    def clamp_scales(self):
        """Clamp these logarithms to [0, ln 100] after each step: beyond, the softmax saturates and training breaks."""
        for scale in self.scales():
            scale.clamp_(0, math.log(100))


class Teacher(nn.Module):
    """theta_t <- lambda theta_t + (1 - lambda) theta_s: an exponential moving average of the student, without gradient.

    With lambda = 0.999 half of the average is the last 693 steps. It starts as a copy and averages every parameter. It
    uses neither cross-attention nor scales, but with both averaged it is a complete model, whose attention can be
    drawn.
    """

    def __init__(self, student):
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images, texts):
        """The two global views, lists of (B, 3, s, s) and (B, T) -> image (2, B, D), text (2, B, D), of unit length.

        Where only images are distilled, texts is empty and the second is None.
        """
        image = unit(self.model.visual(images)[0])
        if not len(texts):
            return image, None
        return image, unit(self.model.text(texts)[0])

    @torch.no_grad()
    def update(self, student, momentum):
        """ours: call it after optimizer.step, as the paper's text and DINO do. The released code calls it before, and
        so averages the student of one step earlier (its train.py:185-193 comes before 213-221)."""
        # t + (1 - lambda) (s - t), for all parameters at once
        torch._foreach_lerp_(list(self.model.parameters()), list(student.parameters()), 1 - momentum)


# --- 6. Across GPUs: the pairs of this one against the pairs of all --------------------------------------------------

class Gather(torch.autograd.Function):
    """(V, B, D) on every rank -> (V, N, D) on all of them, and gradients back the same way.

    ours: the gradient is exact. Every rank's loss depends on my vectors: the backward sums over ranks, and DDP's mean
    makes it the gradient of the mean loss. The released code gathers without gradient, which leaves 1/world of it.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.B = x.shape[1]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()            # all_reduce writes into it
        dist.all_reduce(grad)
        return grad.narrow(1, dist.get_rank() * ctx.B, ctx.B)


def gather(*features):
    """Several (V, B, D) -> several (V, N, D). On one GPU they pass untouched.

    One collective for all of them: the released code has one for every pair of views, 160 a step.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    gathered = Gather.apply(torch.cat(features))
    return gathered.split([len(x) for x in features])


# --- 7. The two losses ---------------------------------------------------------------------------------- Sec. 3.3 ---

def nce(queries, keys, scale):
    """L_nce: query i must find key i among all N. The mean over the B queries of all V x U combinations of views.

    queries (V, B, D) of this GPU, keys (U, N, D) of all, of unit length; scale = 1/temperature.

    By pencil: queries (1, 0) and (0, 1), keys (1, 0) and (0.6, 0.8), scale 1. Logits [[1, 0.6], [0, 0.8]]. Losses:
    query 0 ln(1 + e^-0.4) = 0.5130, query 1 ln(1 + e^-0.8) = 0.3711, mean 0.4421. With queries and keys exchanged
    ln(1 + e^-1) = 0.3133 and ln(1 + e^-0.2) = 0.5981, mean 0.4557. symmetric_nce is the mean of both: 0.4489.
    """
    V, B, _ = queries.shape
    U, N, _ = keys.shape
    with torch.autocast(queries.device.type, enabled=False):            # float32, also in a bf16 run
        logits = scale * queries.flatten(0, 1) @ keys.flatten(0, 1).T  # (V*B, U*N), one product
    first = dist.get_rank() * B if N > B else 0                         # where my pairs begin among all N
    own_key = torch.arange(first, first + B, device=logits.device)
    target = own_key.view(1, B, 1).expand(V, B, U)
    logits = logits.view(V * B * U, N)              # each query chooses among the N keys of one view
    return F.cross_entropy(logits, target.flatten())


def symmetric_nce(a, b, all_a, all_b, scale):
    """L_sym-nce(a, b) = (L_nce(a, b) + L_nce(b, a)) / 2. a (V, B, D), b (U, B, D) of this GPU, all_a, all_b of all."""
    return (nce(a, all_b, scale) + nce(b, all_a, scale)) / 2


def clip_loss(out, scale):
    """L_CLIP: the student's two global images against all its captions, 2 x U pairs of views. scale = exp(logit_scale).

    With 2 + 6 captions these are 16 pairs of views. The heads have no part in it: it is CLIP's loss on [cls] and [eot].

    code≠paper: local image views stay out, because with them the released model overfitted (loss.py:203-206).
    """
    cls, eot = out.image[:2], out.text
    all_cls, all_eot = gather(cls, eot)
    return symmetric_nce(cls, eot, all_cls, all_eot, scale)


def cosmos_terms(out, teacher_image, teacher_text, scale):
    """The four terms of L_COSMOS, (4,).                                                              Sec. 3.3, Eq. 6

    Each pairs every student view with both teacher views (V x 2 or U x 2 pairs). Pairs of the same view count too;
    DINO leaves them out (code≠paper: loss.py:131-139). scale = exp(distill_logit_scale).
    """
    h_I = out.image_x
    h_T = out.text_x
    all_h_I, all_h_T, all_teacher_image, all_teacher_text = gather(h_I, h_T, teacher_image, teacher_text)
    return torch.stack([
        symmetric_nce(h_I, teacher_image, all_h_I, all_teacher_image, scale),
        symmetric_nce(h_I, teacher_text, all_h_I, all_teacher_text, scale),
        symmetric_nce(h_T, teacher_image, all_h_T, all_teacher_image, scale),
        symmetric_nce(h_T, teacher_text, all_h_T, all_teacher_text, scale)])


def cosmos_loss(out, teacher_image, teacher_text, scale):
    """L_COSMOS, the mean of the four terms. The total loss is L_CLIP + L_COSMOS, weights 1 and 1.    Sec. 3.3, Eq. 6"""
    return cosmos_terms(out, teacher_image, teacher_text, scale).mean()


# --- 8. Names of the released code and of open_clip ------------------------------------------------------------------

RENAMES = {          # our prefix -> theirs; first match wins. They have the text tower at the root.
    'image_cross.': 'visual.attn_cross_pool.',
    'text_cross.': 'text_attn_cross_pool.',
    'image_tokens.': 'image_token_mapping.',
    'text_tokens.': 'text_token_mapping.',
    'visual.': 'visual.',
    'logit_scale': 'logit_scale',
    'distill_logit_scale': 'distill_logit_scale',
    'text.': '',
}


def rename(state_dict, table):
    """Every key with its first matching prefix replaced; values pass untouched."""
    renamed = {}
    for key, value in state_dict.items():
        prefix = next((prefix for prefix in table if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f'{key} is no parameter of COSMOS')
        renamed[table[prefix] + key.removeprefix(prefix)] = value
    return renamed


def to_openclip(state_dict):
    """Our names -> the released code's. open_clip loads the result with only the COSMOS heads left over."""
    return rename(state_dict, RENAMES)


def from_openclip(state_dict):
    """The released code's or open_clip's names -> ours, for load_state_dict(strict=True).

    Weights of open_clip's ViT-B have no heads: load them into a model with cross_heads=0.
    """
    return rename(state_dict, {theirs: ours for ours, theirs in RENAMES.items()})


if __name__ == '__main__':      # python cosmos.py: forward and backward on noise, and what the losses read
    torch.manual_seed(0)
    model = COSMOS(Config.preset('tiny', vocab_size=1000))
    teacher = Teacher(model)
    images = [torch.randn(4, 3, size, size) for size in (64, 64, 32, 32, 32)]
    texts = torch.randint(1, 999, (5, 4, 64))
    texts[:, :, -1] = 999                                               # the end of text
    out = model(images, texts)
    teacher_image, teacher_text = teacher(images[:2], texts[:2])
    loss = clip_loss(out, model.logit_scale.exp())
    loss = loss + cosmos_loss(out, teacher_image, teacher_text, model.distill_logit_scale.exp())
    loss.backward()
    teacher.update(model, momentum=0.999)
    for name, value in out._asdict().items():
        print(f'{name:14} {tuple(value.shape)}')
    print(f'loss           {loss.item():.4f} on noise; blind guessing among 4 pairs would be 2 ln 4 = 2.7726')
