"""COSMOS: cross-modality self-distillation for vision-language pre-training (CVPR 2025, arXiv 2412.01814).

CLIP matches a picture with its caption by one vector each, and big objects drown small ones. COSMOS shows the
student crops of both: image crops, and text crops (single sentences), while a slowly moving teacher sees whole
pictures and long captions. Each vector of the student then looks into the tokens of the other modality before it
has to find the teacher's vectors, so a sentence on a small object must be found in the picture.

One training step, every name is a name below:

    images = [2 global views (B,3,224,224), 6 local (B,3,96,96)]             texts = [2 global (B,77), 6 local (B,T)]
                     |                                                                   |
    student     VisionTower ---- patch tokens of view 0 --.    .-- word tokens of caption 0 ---- TextTower
                     |                                     |  |                                  |
              [cls] (V,B,D) --- query ---> text_cross <----|--'                                  |
                     |                         |           '----> image_cross <--- query --- [eot] (U,B,D)
                     '---------- + ------------'                      '------------- + ----------'
                     |           |                                                   |           |
                     |       image_x = h_I, Eq. 1                     Eq. 2, text_x = h_T        |
                     |           |                                                   |           |
                     |           '--- cosmos_loss, against the teacher, Eq. 6 ---------'           |
                     '------------------------------ clip_loss ------------------------------------'

    teacher     an EMA copy of the student that sees only the 2 + 2 globals, without gradient or cross-attention

    out = model(images, texts)                                    # student, all views
    teacher_image, teacher_text = teacher(images[:2], texts[:2])  # teacher, globals only
    loss = clip_loss(out, model.logit_scale.exp())
    loss = loss + cosmos_loss(out, teacher_image, teacher_text, model.distill_logit_scale.exp())
    loss.backward(); optimizer.step()
    teacher.update(model, momentum)

Read it beside Section 3 of the paper. Sections 1-3 below are CLIP (skip them if you know it), 4-7 are COSMOS.

Notation, in every shape comment. Views come first, (V, B, D), and views 0 and 1 are the two globals, always.
    B pairs on this GPU     N pairs on all GPUs     V image views, 2 global + local     U captions, 2 global + local
    P patches               T tokens                L either of them, as a sequence     n sequences of one length
    C tower width           D joint width           H heads, d = C / H or D / H         M rows in all, R that ask

`code≠paper:` marks what follows the released code (github.com/ExplainableML/cosmos) where the paper's text differs or
is silent; `ours:` marks a deliberate difference from that code. Parameters in the towers have open_clip's names.
"""
import copy
import math
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
    """Everything that decides the shapes of the parameters. Raises ValueError when the sizes do not fit together."""
    embed_dim: int = 512            # D, the joint space of images and texts
    image_size: int = 224           # side of a global view, in pixels; fixes the grid of position embeddings
    local_image_size: int = 96      # side of a local view
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77        # T of a caption that is not cut
    vocab_size: int = 49408         # CLIP's; id vocab_size - 1 ends a text and must be the largest
    cross_heads: int = 8            # heads of C^I and C^T; 0 builds a plain CLIP without anything of COSMOS

    def __post_init__(self):
        p, sizes = self.patch_size, {'image_size': self.image_size, 'local_image_size': self.local_image_size}
        for name, size in sizes.items():
            if size % p or size < p:
                raise ValueError(f'{name} {size} is no multiple of the patch size {p}; choose {max(size // p, 1) * p}')
        pairs = ('vision_width', 'vision_heads'), ('text_width', 'text_heads'), ('embed_dim', 'cross_heads')
        for (width, wide), (heads, many) in [[(name, getattr(self, name)) for name in pair] for pair in pairs]:
            if many and wide % many:
                raise ValueError(f'{width} {wide} cannot be split into {many} {heads}; choose a multiple of {many}')

    @classmethod
    def preset(cls, name, **changes):
        """A named configuration, with any field changed. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset '{name}'; choose from {', '.join(PRESETS)}")
        return replace(cls(**PRESETS[name]), **changes)


PRESETS = {
    'vit-b-16': dict(),                                               # the paper's main model: 152,382,466 parameters
    'vit-b-32': dict(patch_size=32),                                  # the other released one
    'vit-s-16': dict(embed_dim=384, vision_width=384, vision_heads=6, text_width=384, text_heads=6),
    'tiny': dict(embed_dim=128, image_size=64, local_image_size=32, patch_size=8, vision_width=192, vision_layers=4,
                 vision_heads=3, text_width=128, text_layers=2, text_heads=2, context_length=64, cross_heads=4),
}

# --- 2. Transformer: attention, block, stack. Shared by both towers; Attention also by the cross-attention heads. ----

def attention_weights(q, k, mask=None):
    """softmax(q k^T / sqrt(d)): q (..., Q, d), k (..., L, d) -> (..., Q, L); mask is True where a key may be seen."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                            # (..., Q, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)


def attend(q, k, v, mask=None):
    """Weighted values, (..., Q, d). The two branches are the same mathematics.

    The fused kernel is the right thing on a GPU. On CPUs it costs up to five times the written-out form at the short
    sequences of this method.
    """
    if q.device.type == 'cpu':
        return attention_weights(q, k, mask) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Group(NamedTuple):
    """n sequences of one length. Views of all sizes lie row after row in one (M, C) tensor, group after group:

        2 global views of B images, 197 rows each | 6 local views of B images, 37 rows each       M = 2 B 197 + 6 B 37

    LayerNorms and products take all rows at once, whatever they belong to; only attention has to tell groups apart.
    """
    n: int              # sequences
    Q: int              # rows that ask in each: all L, or 1 of them; in cross-attention V or U others
    L: int              # rows of each, which are its keys
    mask: object        # (Q, L) or (n, 1, Q, L), True where a key may be seen; None for everywhere


class Attention(nn.Module):
    """Multi-head attention with the parameters, names and initial values of nn.MultiheadAttention.

    Written out because three uses need what that module hides: one row of queries against all keys (last block),
    queries of all views against keys projected once (cross-attention), and the correlative form (segmentation).
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))               # rows: query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, query, context):
        """query (R, C), context (M, C) -> q (R, C), k and v (M, C)."""
        if query is context:                                                            # one product instead of two
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        C = query.shape[-1]
        weight_q, weight_kv = self.in_proj_weight.split([C, 2 * C])
        bias_q, bias_kv = self.in_proj_bias.split([C, 2 * C])
        return F.linear(query, weight_q, bias_q), *F.linear(context, weight_kv, bias_kv).chunk(2, dim=-1)

    def split_heads(self, x, n):
        """(n * L, C) -> (n, H, L, d)."""
        return x.unflatten(0, (n, -1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, query, context, groups, csa=False):
        """query (R, C), context (M, C), the rows of all groups -> (R, C). Queries see their sequence's keys only."""
        asked, seen, pooled = [g.n * g.Q for g in groups], [g.n * g.L for g in groups], []
        all_q, all_k, all_v = self.project(query, context)
        for g, *parts in zip(groups, all_q.split(asked), all_k.split(seen), all_v.split(seen)):
            q, k, v = (self.split_heads(x, g.n) for x in parts)                         # (n, H, Q or L, d)
            if csa:     # SCLIP's correlative self-attention: places that look alike attend to each other and stay put
                x = (attention_weights(q, q) + attention_weights(k, k)) @ v             # (n, H, Q, d)
            else:
                x = attend(q, k, v, g.mask)                                             # (n, H, Q, d)
            pooled.append(x.transpose(1, 2).flatten(2).flatten(0, 1))                   # (n * Q, C)
        return self.out_proj(torch.cat(pooled))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(LN x), then x + MLP(LN x). GELU is exact, as in the released models."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({'c_fc': nn.Linear(width, 4 * width), 'c_proj': nn.Linear(4 * width, width)})

    def forward(self, x, groups, read=None, csa=False):
        """x (M, C), the rows of all groups -> (M, C); with `read` (R,) only those rows, (R, C).

        All rows are keys and values either way, so the rows read equal those of the whole result.
        """
        context = query = self.ln_1(x)                                                  # (M, C)
        if read is not None:
            x, query = x.index_select(0, read), context.index_select(0, read)           # (R, C)
        x = x + self.attn(query, context, groups, csa)
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class Transformer(nn.Module):
    """A stack of blocks. `grad_checkpointing` trades a second forward pass for the memory of all activations."""

    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.grad_checkpointing = False

    def forward(self, x, shapes, at, keep, causal=False, csa=False):
        """x (M, C), groups of sequences of the shapes [(n, L), ...]; at (sum of n,), the row to read in each sequence
        -> these rows, (sum of n, C), and all rows of the first `keep` sequences, (keep, L, C), or None.

        Only the cross-attention reads whole sequences, and only those of view 0; of all others one row is read, so the
        last block computes no more than that. Deeper down every row is needed.
        """
        whole, last, places, first = [], [], [], 0
        for (n, L), own in zip(shapes, at.split([n for n, _ in shapes])):
            key = torch.arange(L, device=x.device)
            whole.append(Group(n, L, L, key <= key[:, None] if causal else None))
            full = 0 if places else keep                                                # of the first group, read whole
            if full:
                last.append(whole[0]._replace(n=full))
            if full < n:
                last.append(Group(n - full, 1, L, key <= own[full:, None, None, None] if causal else None))
            places.append(first + L * torch.arange(n, device=x.device) + own)           # (n,), among all M rows
            first += n * L
        for block in self.resblocks[:-1]:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, whole, use_reentrant=False)
            else:
                x = block(x, whole)
        place, front = torch.cat(places), keep * shapes[0][1]
        # The last block returns the first `keep` sequences, `front` rows, and behind them one row of each other one.
        kept, single = torch.arange(front + len(place) - keep, device=x.device).tensor_split([front])
        x = self.resblocks[-1](x, last, torch.cat([kept, place[keep:]]), csa)
        tokens = x[:front].unflatten(0, (keep, -1)) if keep else None                   # (keep, L, C)
        return x.index_select(0, torch.cat([place[:keep], single])), tokens


def same_size(views):
    """Neighbouring views of one size, as lists: [224, 224, 96, 96, 96] -> [[224, 224], [96, 96, 96]]."""
    return [list(group) for _, group in groupby(views, key=lambda view: view.shape)]


# --- 3. The two towers (CLIP) ----------------------------------------------------------------------------------------

class VisionTower(nn.Module):
    """ViT: patches and a class token in, the projected class token and the normalised patch tokens out."""

    def __init__(self, config):
        super().__init__()
        C, grid = config.vision_width, config.image_size // config.patch_size
        self.patch_size = config.patch_size
        self.conv1 = nn.Conv2d(3, C, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(C ** -0.5 * torch.randn(C))
        self.positional_embedding = nn.Parameter(C ** -0.5 * torch.randn(grid ** 2 + 1, C))
        self.ln_pre = nn.LayerNorm(C)
        self.transformer = Transformer(C, config.vision_layers, config.vision_heads)
        self.ln_post = nn.LayerNorm(C)
        self.proj = nn.Parameter(C ** -0.5 * torch.randn(C, config.embed_dim))

    def positions(self, h, w):
        """Position embeddings for an h x w grid of patches, (1 + h*w, C): the learned grid, or bicubic from it."""
        grid = math.isqrt(len(self.positional_embedding) - 1)
        if (h, w) == (grid, grid):
            return self.positional_embedding
        cls, patches = self.positional_embedding.split([1, grid ** 2])
        patches = patches.T.unflatten(1, (grid, grid))[None]                            # (1, C, grid, grid)
        # code≠paper: DINO's + 0.1 guarded against rounding a size down. It also shifts where the grid is sampled, so
        # released weights need it: without, 96-pixel crops get other positions. transformer.py:646-669
        scale = (h + 0.1) / grid, (w + 0.1) / grid
        patches = F.interpolate(patches, scale_factor=scale, mode='bicubic')            # (1, C, h, w)
        return torch.cat([cls, patches[0].flatten(1).T])

    def forward(self, views, keep=False, csa=False):
        """views: list of V (B, 3, h, w) -> [cls] (V, B, D), and if `keep` the patch tokens of view 0 (B, P, C).

        Sizes may differ between views; h and w must be multiples of the patch. The tokens come after ln_post, without
        the class token, which is the query, never a key.
        """
        for h, w in {view.shape[-2:] for view in views}:
            if h % self.patch_size or w % self.patch_size:      # the reshaping below would refuse it less clearly
                raise ValueError(f'an image of {h} x {w} pixels cannot be cut into patches of {self.patch_size}; '
                                 'resize or pad it to multiples of that')
        sequences, B, p = [], len(views[0]), self.patch_size
        for group in same_size(views):
            x = torch.cat(group).unflatten(2, (-1, p)).unflatten(4, (-1, p))            # (n, 3, h, p, w, p)
            n, _, h, _, w, _ = x.shape                                                  # n = views * B
            # Patches do not overlap, so conv1 is one product with them: in bf16 on CPUs 3 to 5 times as fast.
            x = x.permute(0, 2, 4, 1, 3, 5).reshape(n, h * w, -1)                       # (n, P, 3 * p * p)
            x = F.linear(x, self.conv1.weight.flatten(1))                               # (n, P, C)
            sequences.append(torch.cat([self.class_embedding.expand(n, 1, -1), x], dim=1) + self.positions(h, w))
        x = self.ln_pre(torch.cat([x.flatten(0, 1) for x in sequences]))                # (M, C)
        row = torch.zeros(len(views) * B, dtype=torch.long, device=x.device)            # the class token is row 0
        x, kept = self.transformer(x, [x.shape[:2] for x in sequences], row, B if keep else 0, csa=csa)
        tokens = self.ln_post(kept[:, 1:]) if keep else None                            # (B, P, C)
        return (self.ln_post(x) @ self.proj).unflatten(0, (len(views), B)), tokens


class TextTower(nn.Module):
    """Causal transformer. The end-of-text token is the only one that has seen the whole caption: it is the sentence."""

    def __init__(self, config):
        super().__init__()
        C, layers = config.text_width, config.text_layers
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, C))
        self.transformer = Transformer(C, layers, config.text_heads)
        self.ln_final = nn.LayerNorm(C)
        self.text_projection = nn.Parameter(C ** -0.5 * torch.randn(C, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:                                        # CLIP's scaling, as released
            nn.init.normal_(block.attn.in_proj_weight, std=C ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=C ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * C) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=C ** -0.5 * (2 * layers) ** -0.5)

    def forward(self, captions, keep=False, cut=None):
        """captions: list of U (B, T) -> [eot] (U, B, D), and if `keep` the tokens of caption 0 (B, T, C).

        Attention is causal, so padding that is cut off behind the end of a text changes no row that is read. So a
        caption may come with a T of its own, that of its longest text. Or all come at one T, with a plan to cut them,
        [(n, L), ...]: sorted by length, the n longest pass with L tokens, the next n with the next L. A text longer
        than its L would lose its end, unnoticed. With `keep` the plan begins with (B, T): caption 0 is not sorted in.

        The tokens are all T positions after ln_final, start, end and padding included (code≠paper:
        transformer.py:772-775).
        """
        U, B = len(captions), len(captions[0])
        groups = [torch.cat(group) for group in same_size(captions)]                    # each (n, L)
        order = torch.arange(U * B, device=groups[0].device)
        if cut:
            (ids,), front = groups, B * keep
            order[front:] = ids[front:].argmax(dim=1).argsort(descending=True, stable=True) + front
            groups = [some[:, :L] for some, (_, L) in zip(ids[order].split([n for n, _ in cut]), cut)]
        # One lookup for all captions: its backward fills a whole (vocab, C) gradient, each time.
        x = self.token_embedding(torch.cat([ids.flatten() for ids in groups]))          # (M, C)
        x = x + torch.cat([self.positional_embedding[:ids.shape[1]].repeat(len(ids), 1) for ids in groups])
        row = torch.cat([ids.argmax(dim=1) for ids in groups])                          # end-of-text has the largest id
        x, kept = self.transformer(x, [ids.shape for ids in groups], row, B if keep else 0, causal=True)
        tokens = self.ln_final(kept) if keep else None                                  # (B, T, C)
        x = (self.ln_final(x) @ self.text_projection).index_select(0, order.argsort())  # (U * B, D), as they came
        return x.unflatten(0, (U, B)), tokens


# --- 4. Cross-attention heads ------------------------------------------------------------------ Sec. 3.2, Eq. 1-2 ---

class CrossAttention(nn.Module):
    """C: global vectors of one modality pool the tokens of the other. One attention, no MLP, no mask.

    The residual of Eq. 1-2 is added outside. Padding positions are legal keys (code≠paper: transformer.py:210-230):
    behind the causal mask they are further summaries of the caption, not noise.
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
        (V, B, _), L = query.shape, tokens.shape[1]
        query = self.ln_q(query).transpose(0, 1).flatten(0, 1)                          # (B * V, D)
        return self.attn(query, self.ln_k(tokens).flatten(0, 1), [Group(B, V, L, None)]).view(B, V, -1).transpose(0, 1)

    def weights(self, query, tokens):
        """How much each token counts for a query (B, D): (B, L), averaged over heads, rows sum to 1."""
        q, k, _ = self.attn.project(self.ln_q(query), self.ln_k(tokens).flatten(0, 1))
        q, k = (self.attn.split_heads(x.float(), len(query)) for x in (q, k))           # (B, H, 1 or L, d)
        return attention_weights(q, k).mean(dim=1)[:, 0]


# --- 5. The student, and its EMA teacher -------------------------------------------------------- framework figure ---

class Output(NamedTuple):
    """What the losses read, all of unit length. The cross-modal ones are None in a model without cross-attention."""
    image: torch.Tensor         # (V, B, D)  [cls]
    text: torch.Tensor          # (U, B, D)  [eot]
    image_x: torch.Tensor       # (V, B, D)  h_I, Eq. 1
    text_x: torch.Tensor        # (U, B, D)  h_T, Eq. 2


def unit(x):
    """Rows of length 1, in float32 under any autocast: half precision here moves every logit."""
    return F.normalize(x.float(), dim=-1)


class COSMOS(nn.Module):
    """Two towers, two token maps, two cross-attention heads, two learned scales. With cross_heads = 0 a plain CLIP."""

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.embed_dim
        self.visual = VisionTower(config)
        self.text = TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))               # ln(1/temperature), CLIP loss
        if config.cross_heads:
            # code≠paper: the tokens pass a linear map before Eq. 1-2 (model.py:285-287, 306, 331), and L_COSMOS has a
            # scale of its own (model.py:274).
            self.image_tokens = nn.Linear(config.vision_width, D)
            self.text_tokens = nn.Linear(config.text_width, D)
            self.image_cross = CrossAttention(D, config.cross_heads)                    # C^I, reads image tokens
            self.text_cross = CrossAttention(D, config.cross_heads)                     # C^T, reads text tokens
            self.distill_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images, texts, cut=None):
        """images: list of V (B, 3, s, s); texts: list of U (B, T) or one (U, B, T) -> Output. For `cut` see TextTower.

        Keys and values are the tokens of image 0 and caption 0, for the queries of every view (code≠paper, which says
        "global crops"; model.py:370-382). Caption 0 therefore must come at full length; the others may be cut.
        """
        cross = self.config.cross_heads > 0
        image, patches = self.visual(list(images), keep=cross)                          # (V, B, D), (B, P, C)
        text, words = self.text(list(texts), cross, cut)                                # (U, B, D), (B, T, C)
        if not cross:
            return Output(unit(image), unit(text), None, None)
        image_x = image + self.text_cross(image, self.text_tokens(words))               # (V, B, D)  h_I, Eq. 1
        text_x = text + self.image_cross(text, self.image_tokens(patches))              # (U, B, D)  h_T, Eq. 2
        return Output(unit(image), unit(text), unit(image_x), unit(text_x))

    def encode_image(self, images):
        """images (B, 3, h, w), h and w multiples of the patch -> [cls] (B, D), tokens (B, P, D), both un-normalised.

        In a plain CLIP the tokens are None: it has no map for them.
        """
        cross = self.config.cross_heads > 0
        pooled, patches = self.visual([images], keep=cross)
        return pooled[0], self.image_tokens(patches) if cross else None

    def encode_text(self, tokens):
        """tokens (B, T) -> [eot] (B, D), tokens (B, T, D), both un-normalised (tokens None in a plain CLIP)."""
        cross = self.config.cross_heads > 0
        pooled, words = self.text([tokens], keep=cross)
        return pooled[0], self.text_tokens(words) if cross else None

    def encode_dense(self, images, csa=False):
        """images (B, 3, h, w) -> (B, h/p, w/p, D): one unit vector a patch, comparable with text vectors.

        Used for segmentation. With `csa` the last block attends correlatively, as SCLIP does (transformer.py:687-764).
        """
        _, patches = self.visual([images], keep=True, csa=csa)                          # (B, P, C)
        return unit(patches @ self.visual.proj).unflatten(1, (images.shape[-2] // self.config.patch_size, -1))

    def attention(self, images, tokens):
        """images (B, 3, h, w), tokens (B, T) -> weights of C^I over patches (B, P), of C^T over words (B, T).

        C^I is asked by the caption and C^T by the image: the qualitative figure of the paper.
        """
        if not self.config.cross_heads:
            raise ValueError('this model is a plain CLIP and has no cross-attention heads to show; use COSMOS weights')
        (image, patches), (text, words) = self.encode_image(images), self.encode_text(tokens)
        return self.image_cross.weights(text, patches), self.text_cross.weights(image, words)

    @torch.no_grad()
    def clamp_scales(self):
        """Keep both scales in [0, ln 100], after each step: beyond, the softmax saturates and training breaks."""
        for name in ('logit_scale', 'distill_logit_scale'):
            if hasattr(self, name):
                getattr(self, name).clamp_(0, math.log(100))

    def set_grad_checkpointing(self, on=True):
        """Recompute activations in the backward pass: one more forward pass for less memory."""
        self.visual.transformer.grad_checkpointing = self.text.transformer.grad_checkpointing = on


class Teacher(nn.Module):
    """theta_t <- lambda theta_t + (1 - lambda) theta_s: an exponential moving average of the student, without gradient.

    It starts as a copy and averages every parameter: the heads too, though it never runs them, so that attention can be
    drawn from the teacher's weights, and the scales.
    """

    def __init__(self, student):
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images, texts, cut=None):
        """The two global views (2 x (B, 3, s, s), 2 x (B, T)) -> image (2, B, D), text (2, B, D), of unit length.

        Without texts, as a teacher of images alone needs none, the second is None. For `cut` see TextTower.
        """
        image = unit(self.model.visual(list(images))[0])
        return image, unit(self.model.text(list(texts), cut=cut)[0]) if len(texts) else None

    @torch.no_grad()
    def update(self, student, momentum):
        """ours: call it after optimizer.step, as the paper's text and DINO do. The released code averages the student
        of one step earlier (train.py:185-193 comes before 213-221)."""
        torch._foreach_lerp_(list(self.model.parameters()), list(student.parameters()), 1 - momentum)


# --- 6. Across GPUs: my rows against everybody's columns -------------------------------------------------------------

class Gather(torch.autograd.Function):
    """(V, B, D) on every rank -> (V, N, D) on all of them, and gradients back the same way.

    ours: the gradient is exact. Every rank's loss depends on my rows, so what the others owe me is summed. The released
    code gathers without gradient: its gradient is 1/world of the true one. Detaching the columns while keeping
    local rows only would even turn its direction.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.B = x.shape[1]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[:, dist.get_rank() * ctx.B:][:, :ctx.B]


def gather(*features):
    """Several (V, B, D) -> several (V, N, D), in one collective. Alone in the world they pass untouched."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return features
    return Gather.apply(torch.cat(features)).split([len(x) for x in features])


# --- 7. The two losses ---------------------------------------------------------------------------------- Sec. 3.3 ---

def compare(rows, columns, scale):
    """Logits of all rows with all columns: rows (V, B, D), columns (U, N, D), of unit length -> (V, B, U, N) float32.

    scale = 1/temperature.
    """
    with torch.autocast(rows.device.type, enabled=False):                               # float32, whatever trains
        logits = scale * rows.flatten(0, 1) @ columns.flatten(0, 1).T                   # (V*B, U*N), all views at once
    return logits.view(*rows.shape[:2], *columns.shape[:2])


def nce(logits):
    """L_nce of every pair of views: logits (V, B, U, N) -> (V, U): row i must find column i among all N, the mean over
    rows. On rank r row i belongs to column r*B + i.

    By pencil: rows (1, 0) and (0, 1), columns (1, 0) and (0.6, 0.8), scale 1. Logits [[1, 0.6], [0, 0.8]]: row 0 loses
    ln(1 + e^-0.4) = 0.5130, row 1 ln(1 + e^-0.8) = 0.3711, mean 0.4421. The columns lose ln(1 + e^-1) = 0.3133 and
    ln(1 + e^-0.2) = 0.5981, mean 0.4557. symmetric_nce is the mean of both means: 0.4489.
    """
    V, B, U, N = logits.shape
    first = dist.get_rank() * B if N > B else 0
    target = torch.arange(first, first + B, device=logits.device)[:, None].expand(V, B, U)
    return F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction='none').view(V, B, U).mean(dim=1)


def symmetric_nce(a, b, all_a, all_b, scale):
    """L_sym-nce(a, b) = (L_nce(a, b) + L_nce(b, a)) / 2 of every pair of views, (V, U).

    a (V, B, D), b (U, B, D); all_a and all_b are the same gathered to N.
    """
    logits = compare(a, all_b, scale)                                                   # (V, B, U, N)
    if all_a.shape != a.shape:
        return (nce(logits) + nce(compare(b, all_a, scale)).T) / 2
    # Alone in the world one product serves both directions: column i must find row i, the classes are in dimension 1.
    V, B, U, _ = logits.shape
    target = torch.arange(B, device=logits.device).expand(V, U, B)
    return (nce(logits) + F.cross_entropy(logits, target, reduction='none').mean(dim=2)) / 2


def clip_loss(out, scale):
    """L_CLIP: the student's two global images against all its captions, 2 x U pairs of views. scale = exp(logit_scale).

    code≠paper: local image views stay out, because with them the released model overfitted (loss.py:203-206).
    """
    image, text = out.image[:2], out.text
    return symmetric_nce(image, text, *gather(image, text), scale).mean()


def cosmos_terms(out, teacher_image, teacher_text, scale):
    """The four terms of L_COSMOS, (4,): h_I to CLS_t, h_I to EOT_t, h_T to CLS_t, h_T to EOT_t.     Sec. 3.3, Eq. 6

    Each pairs every student view with both teacher views (V x 2 or U x 2 pairs). Pairs of the same view count too;
    DINO leaves them out (code≠paper: loss.py:131-139). scale = exp(distill_logit_scale).
    """
    student, teacher = torch.cat([out.image_x, out.text_x]), torch.cat([teacher_image, teacher_text])
    pairs = symmetric_nce(student, teacher, *gather(student, teacher), scale)           # (V + U, 2 + 2), all at once
    h_I, h_T = pairs.split([len(out.image_x), len(out.text_x)])
    return torch.cat([h_I.mean(dim=0), h_T.mean(dim=0)]).view(4, 2).mean(dim=1)         # teacher's CLS, EOT for each


def cosmos_loss(out, teacher_image, teacher_text, scale):
    """L_COSMOS, the mean of the four terms.                                                          Sec. 3.3, Eq. 6

    The total loss is L_CLIP + L_COSMOS, with weights 1 and 1.
    """
    return cosmos_terms(out, teacher_image, teacher_text, scale).mean()


def distill_terms(out, teacher_image, teacher_text, scale):
    """Self-distillation without cross-attention: [cls] to CLS_t, (1,), and with a teacher_text [eot] to EOT_t, (2,).

    For the rows of Table 5 between CLIP and COSMOS. Our reading: their loss is not known to us, so it is that of Eq. 6
    with the embeddings themselves in place of h_I and h_T, each against the teacher of its own modality.
    """
    if teacher_text is None:
        return symmetric_nce(out.image, teacher_image, *gather(out.image, teacher_image), scale).mean()[None]
    all_I, all_T, all_cls, all_eot = gather(out.image, out.text, teacher_image, teacher_text)
    return torch.stack([symmetric_nce(out.image, teacher_image, all_I, all_cls, scale).mean(),
                        symmetric_nce(out.text, teacher_text, all_T, all_eot, scale).mean()])


# --- 8. Names of the released code and of open_clip ------------------------------------------------------------------

RENAMES = {                         # our prefix -> theirs; first match wins. They keep the text tower at the root.
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
    def new(key):
        old = next((old for old in table if key.startswith(old)), None)
        if old is None:
            raise ValueError(f"'{key}' is no parameter of COSMOS; expected names that start with {', '.join(table)}")
        return table[old] + key[len(old):]
    return {new(key): value for key, value in state_dict.items()}


def to_openclip(state_dict):
    """Our names -> the released code's. open_clip loads the result with only the COSMOS heads left over."""
    return rename(state_dict, RENAMES)


def from_openclip(state_dict):
    """The released code's or open_clip's names -> ours, for load_state_dict(strict=True).

    Weights of open_clip's ViT-B have no heads: load them into a model with cross_heads=0.
    """
    return rename(state_dict, {theirs: ours for ours, theirs in RENAMES.items()})


if __name__ == '__main__':      # python cosmos.py: the losses of a step on noise, and the shapes of what they read
    torch.manual_seed(0)
    B, config = 4, Config.preset('tiny', vocab_size=1000)
    model = COSMOS(config)
    teacher = Teacher(model)
    images = [torch.randn(B, 3, size, size) for size in [config.image_size] * 2 + [config.local_image_size] * 6]
    texts = [torch.randint(1, 998, (B, length)) for length in [config.context_length] * 2 + [16] * 6]
    for caption in texts:
        caption[:, 0], caption[:, -1] = config.vocab_size - 2, config.vocab_size - 1
    out = model(images, texts)
    teacher_image, teacher_text = teacher(images[:2], texts[:2])
    loss = clip_loss(out, model.logit_scale.exp())
    loss = loss + cosmos_loss(out, teacher_image, teacher_text, model.distill_logit_scale.exp())
    loss.backward()
    teacher.update(model, momentum=0.999)
    print(f'{sum(p.numel() for p in model.parameters()):,} parameters, B = {B}, D = {config.embed_dim}')
    for name, value in {**out._asdict(), 'teacher_image': teacher_image, 'teacher_text': teacher_text}.items():
        print(f'{name:14} {tuple(value.shape)}')
    print(f'loss {loss.item():.4f} on noise; blind guessing among {B} pairs would be 2 ln {B} = {2 * math.log(B):.4f}, '
          'and random weights, which are sure of themselves at scale 14, are worse')
