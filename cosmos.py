"""COSMOS: cross-modality self-distillation for vision-language pre-training (CVPR 2025, arXiv 2412.01814).

CLIP matches one vector of a picture with one vector of its caption, and in both big objects drown small ones. COSMOS
shows a student network crops: parts of the picture, and single sentences of the caption. A teacher network, a slow
average of the student, sees large crops and several sentences. Each vector of the student attends to the tokens of the
other modality, and must then tell the teacher's vectors of its own pair from those of all others. So a sentence about a
small object has to be found in the picture.

One training step. Every name is that of the code below.

    images: 2 global views, 6 local                               texts: 2 global captions, 6 local
           |                                                                      |
      VisionTower ------ patches of view 0 -----.      .----- words of caption 0 ----- TextTower               STUDENT
           |                                    |      |                          |
     cls (V,B,D) ---- query ---> text_cross <---|------'                     eot (U,B,D)
           |                        C^T         '------> image_cross <-- query ---|
           |                         |                       C^I                  |
           |            h_I = C^T + cls   Eq. 1       h_T = C^I + eot   Eq. 2     |
           |                         |                        |                   |
           '------ clip_loss --------|------------------------|-------------------'
                                     '----- cosmos_loss ------'      Eq. 6: h_I and h_T, each with cls_t and eot_t
                                              |      |
      VisionTower --------------------- cls_t (2,B,D)  eot_t (2,B,D) ----------------- TextTower               TEACHER
      on the 2 global views               an average of students                 on the 2 global captions
                                          without gradient or heads

    out = model(images, texts)                                          # student, all views and captions
    cls_t, eot_t = teacher(images[:2], texts[:2])                       # teacher, globals only
    loss = clip_loss(out, model.logit_scale.exp())
    loss = loss + cosmos_loss(out, cls_t, eot_t, model.distill_logit_scale.exp())
    loss.backward()
    optimizer.step()
    model.clamp_scales()
    teacher.update(model, momentum)                                     # momentum is lambda: 0.999 at batch 1,024

Read it beside Section 3 of the paper. Parts 1-5 are COSMOS: what it is, then what it learns from. Parts 6-7 are the
towers and transformers of CLIP, which they stand on: skim them if you know it.

Notation in every shape comment. Views come first, (V, B, D), and views 0 and 1 are the two globals, always.
    B pairs on this GPU     N pairs on all GPUs     V image views, 2 global + local     U captions, 2 global + local
    P patches               T text tokens, with padding     L rows of a sequence: T, P, or 1 + P with the class token
    C tower width           D joint width                   n sequences that go through a tower together
    Q rows of queries       H attention heads, d = C / H
`ids` are numbers of tokens, as a tokenizer gives them; `patches` and `words` are vectors.

We follow the released code (github.com/ExplainableML/cosmos); `model.py:274` and the like are lines of it.
    code≠paper: the paper's text says something else.           paper silent: the paper's text does not say.
    ours: here we differ from the released code on purpose.
Parameters of the towers have open_clip's names.
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

# --- 2. The student ----------------------------------------------------------------------------- Sec. 3.2, Eq. 1-2 ---

class CrossAttention(nn.Module):
    """C^I or C^T: the [cls] or [eot] of every view pools the tokens of the other modality. One attention, no MLP.

    COSMOS.forward adds the residual of Eq. 1-2. Padding of a text is attended to as well (paper silent:
    transformer.py:210-230): its rows come after the end, so they have seen the whole caption, too. They are further
    summaries of it, not noise.
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


class Output(NamedTuple):
    """What the losses read, all of unit length. h_I and h_T are None in a model without cross-attention.

    Pair b of the batch is [:, b]: all its views, and all its captions, are positives of each other.
    """
    cls: torch.Tensor           # (V, B, D)  one vector for each image view
    eot: torch.Tensor           # (U, B, D)  one vector for each caption
    h_I: torch.Tensor           # (V, B, D)  the same for image views that have read the caption, Eq. 1
    h_T: torch.Tensor           # (U, B, D)  and for captions that have read the image, Eq. 2


def unit(x):
    """Rows of length 1, in float32 under any autocast: half precision would shift every logit."""
    return F.normalize(x.float(), dim=-1)


class COSMOS(nn.Module):
    """Two towers, two linear maps, two cross-attention heads, two learned scales. With cross_heads = 0 a plain CLIP.

    The towers are CLIP's. The maps bring patches and words to width D, for the heads C^I and C^T to read. After
    training only the towers are needed: retrieval, classification and segmentation never call the heads.
    """

    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        self.config = config
        self.has_heads = config.cross_heads > 0
        self.visual = VisionTower(config)
        self.text = TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # ln(1/temperature), L_CLIP
        if self.has_heads:
            # paper silent: the tokens pass a linear map before Eq. 1-2 (training: model.py:285-287, 331, 436), and
            # L_COSMOS has a scale of its own (model.py:274).
            self.image_map = nn.Linear(config.vision_width, D)
            self.text_map = nn.Linear(config.text_width, D)
            self.image_cross = CrossAttention(D, config.cross_heads)    # C^I, reads patches
            self.text_cross = CrossAttention(D, config.cross_heads)     # C^T, reads words
            self.distill_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images, texts):
        """images: list of V (B, 3, s, s); texts: list of U (B, T) ids, or one tensor (U, B, T) -> Output.

        The queries are those of all views. Keys and values are the patches of view 0 and the words of caption 0 alone
        (code≠paper, which says "global crops": model.py:370-382). Words are all T positions, padding included (paper
        silent: transformer.py:772-775), so caption 0 comes at full length. The others may be cut, see TextTower.
        """
        if not self.has_heads:
            return Output(unit(self.visual(images)), unit(self.text(texts)), None, None)
        cls, rows = self.visual.with_tokens(images)                     # (V, B, D), (B, 1 + P, C)
        eot, words = self.text.with_tokens(texts)                       # (U, B, D), (B, T, C)
        patches = rows[:, 1:]                                           # without the class token, as released
        h_I = self.text_cross(cls, self.text_map(words)) + cls          # (V, B, D)  Eq. 1
        h_T = self.image_cross(eot, self.image_map(patches)) + eot      # (U, B, D)  Eq. 2
        return Output(unit(cls), unit(eot), unit(h_I), unit(h_T))

    def encode_image(self, images):
        """images (B, 3, h, w), h and w multiples of the patch -> [cls] (B, D), patches (B, P, D), both un-normalised.

        In a plain CLIP the patches are None: it has no map for them.
        """
        cls, rows = self.visual.with_tokens([images])
        return cls[0], self.image_map(rows[:, 1:]) if self.has_heads else None

    def encode_text(self, ids):
        """ids (B, T) -> [eot] (B, D), words (B, T, D), both un-normalised. In a plain CLIP the words are None."""
        eot, words = self.text.with_tokens([ids])
        return eot[0], self.text_map(words) if self.has_heads else None

    def encode_dense(self, images, csa=False):
        """images (B, 3, h, w) -> (B, h/p, w/p, D): one unit vector a patch, comparable with text vectors.

        Used for segmentation. With `csa` the last block attends correlatively, as SCLIP does (transformer.py:687-764).
        """
        _, rows = self.visual.with_tokens([images], csa)                # (B, 1 + P, C)
        patches = unit(rows[:, 1:] @ self.visual.proj)                  # (B, P, D)
        h = images.shape[2] // self.config.patch_size
        return patches.unflatten(1, (h, -1))

    def attention(self, images, ids):
        """images (B, 3, h, w), ids (B, T) -> weights of C^I over patches (B, P), of C^T over words (B, T).

        The caption is the query of C^I and the image that of C^T: the qualitative figure of the paper.
        """
        if not self.has_heads:
            raise ValueError('this model is a plain CLIP and has no cross-attention heads to show; use COSMOS weights')
        cls, patches = self.encode_image(images)
        eot, words = self.encode_text(ids)
        return self.image_cross.weights(eot, patches), self.text_cross.weights(cls, words)

    def scales(self):
        """The learned logarithms of 1/temperature: L_CLIP's, and with heads L_COSMOS's."""
        return [self.logit_scale, self.distill_logit_scale] if self.has_heads else [self.logit_scale]

    @torch.no_grad()
    def clamp_scales(self):
        """Clamp these logarithms to [0, ln 100] after each step: beyond, the softmax saturates and training breaks."""
        for scale in self.scales():
            scale.clamp_(0, math.log(100))


# --- 3. Its teacher ----------------------------------------------------------------------------- framework figure ---

class Teacher(nn.Module):
    """theta_t <- lambda theta_t + (1 - lambda) theta_s: an exponential moving average of the student, without gradient.

    With lambda = 0.999 the last 693 students have half of the weight. It starts as a copy and averages every parameter.
    It uses neither cross-attention nor scales, but with both averaged it is a complete model, whose attention can be
    drawn.
    """

    def __init__(self, student):
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images, texts):
        """The two globals, lists of (B, 3, s, s) and (B, T) -> cls_t (2, B, D), eot_t (2, B, D), of unit length.

        Without texts (None) eot_t is None: for methods that distil images alone.
        """
        cls_t = unit(self.model.visual(images))
        if texts is None:
            return cls_t, None
        return cls_t, unit(self.model.text(texts))

    @torch.no_grad()
    def update(self, student, momentum):
        """ours: call it after optimizer.step, as the paper's text and DINO do. The released code calls it before, and
        so averages the student of one step earlier (its train.py:185-193 comes before 213-221)."""
        # t + (1 - lambda) (s - t), for all parameters at once
        torch._foreach_lerp_(list(self.model.parameters()), list(student.parameters()), 1 - momentum)


# --- 4. The two losses ---------------------------------------------------------------------------------- Sec. 3.3 ---

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

    code≠paper: local image views stay out, because with them the released model overfitted (loss.py:203-206). That the
    paper takes all crops rests on one account of it.
    """
    cls = out.cls[:2]
    eot = out.eot
    all_cls, all_eot = gather(cls, eot)
    return symmetric_nce(cls, eot, all_cls, all_eot, scale)


def cosmos_terms(out, cls_t, eot_t, scale):
    """The four terms of L_COSMOS by name.                                                            Sec. 3.3, Eq. 6

    Each pairs every student view with both teacher views (V x 2 or U x 2 pairs). Pairs of the same view count, too
    (paper silent: loss.py:131-139); DINO leaves them out. scale = exp(distill_logit_scale).
    """
    h_I = out.h_I
    h_T = out.h_T
    all_h_I, all_h_T, all_cls_t, all_eot_t = gather(h_I, h_T, cls_t, eot_t)
    return {
        'h_I_cls_t': symmetric_nce(h_I, cls_t, all_h_I, all_cls_t, scale),
        'h_I_eot_t': symmetric_nce(h_I, eot_t, all_h_I, all_eot_t, scale),
        'h_T_cls_t': symmetric_nce(h_T, cls_t, all_h_T, all_cls_t, scale),
        'h_T_eot_t': symmetric_nce(h_T, eot_t, all_h_T, all_eot_t, scale)}


def cosmos_loss(out, cls_t, eot_t, scale):
    """L_COSMOS, the mean of the four terms. The total loss is L_CLIP + L_COSMOS, weights 1 and 1.    Sec. 3.3, Eq. 6"""
    terms = cosmos_terms(out, cls_t, eot_t, scale)
    return sum(terms.values()) / 4


# --- 5. Across GPUs: the pairs of this one against the pairs of all --------------------------------------------------

class Gather(torch.autograd.Function):
    """(V, B, D) on every rank -> (V, N, D) on all of them, and gradients back the same way.

    ours: the gradient is exact. Every rank's loss depends on my vectors: the backward sums over ranks, and DDP's mean
    makes it the gradient of the mean loss. The released code gathers without gradient. Its gradient has the same
    direction, but on G GPUs a length of 1/G, except for the two scales. AdamW divides that factor out, but for its eps.
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

    One collective for all of them. The released code has two for each of its 80 pairs of views a step.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    gathered = Gather.apply(torch.cat(features))
    return gathered.split([len(x) for x in features])


# --- 6. The two towers (CLIP) ----------------------------------------------------------------------------------------

def same_size(views):
    """Neighbouring views of one size, joined: sizes 224, 96, 96, 96 -> two tensors, (B, ...) and (3 B, ...)."""
    return [torch.cat(list(group)) for _, group in groupby(views, key=lambda view: view.shape)]


class Tower(nn.Module):
    """What both towers do. Of each view they read one row: of an image the class token, of a text its end.

    A tower has `embed`, which takes a list of tensors of views, and yields for each its sequences (n, L, C) and the row
    to read in them (n,); and `transformer`, `norm` and `proj`.
    """

    def forward(self, views):
        """views: list of V (B, ...) -> [cls] or [eot] (V, B, D). Sizes may differ; neighbours of one size share a pass.

        No other row is read, so the last block computes only this one.
        """
        features = [self.read(x, row) for x, row in self.embed(same_size(views))]       # each (n, D)
        return torch.cat(features).unflatten(0, (len(views), -1))

    def with_tokens(self, views, csa=False):
        """The same, and all rows of view 0, (B, L, C), normalised. View 0 passes alone, for the heads read it whole."""
        first, *others = self.embed([views[0], *same_size(views[1:])])
        x, row = first
        tokens = self.norm(self.transformer(x, csa=csa))                # (B, L, C)
        features = [pick(tokens, row)[:, 0] @ self.proj]
        features += [self.read(x, row) for x, row in others]
        return torch.cat(features).unflatten(0, (len(views), -1)), tokens

    def read(self, x, row):
        """Sequences x (n, L, C), row (n,) -> (n, D)."""
        x = self.transformer(x, row)                                    # (n, 1, C)
        return self.norm(x[:, 0]) @ self.proj


class VisionTower(Tower):
    """ViT: a class token and patches. Its rows are the class token, then the patches."""

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
        self.norm = nn.LayerNorm(C)
        self.proj = nn.Parameter(std * torch.randn(C, config.embed_dim))

    def embed(self, groups):
        """Images (n, 3, height, width) -> the class token and the patches, with their positions, (n, 1 + P, C)."""
        p = self.patch_size
        for images in groups:
            n, _, height, width = images.shape
            if height % p or width % p:
                raise ValueError(f'an image of {height} x {width} pixels cannot be cut into patches of {p}; '
                                 'resize or pad it to multiples of that')
            # Patches do not overlap, so conv1 equals a matrix product, in bf16 on CPUs 3 to 5 times as fast.
            patches = F.unfold(images, kernel_size=p, stride=p).transpose(1, 2)     # (n, P, 3 * p * p)
            patches = F.linear(patches, self.conv1.weight.flatten(1))   # (n, P, C)
            cls = self.class_embedding.expand(n, 1, -1)
            x = torch.cat([cls, patches], dim=1) + self.positions(height // p, width // p)
            class_row = torch.zeros(n, dtype=torch.long, device=x.device)
            yield self.ln_pre(x), class_row

    def positions(self, h, w):
        """Position embeddings for an h x w grid of patches, (1 + h*w, C): the learned grid, or bicubic from it."""
        grid = self.grid
        if h == w == grid:
            return self.positional_embedding
        cls, patches = self.positional_embedding.split([1, grid ** 2])
        patches = patches.T.unflatten(1, (grid, grid))[None]            # (1, C, grid, grid)
        # paper silent: DINO adds 0.1 so that rounding never loses a row. This also stretches the grid a little, and the
        # released weights were trained so: without it local crops get other positions. transformer.py:646-669
        zoom = (h + 0.1) / grid, (w + 0.1) / grid
        patches = F.interpolate(patches, scale_factor=zoom, mode='bicubic')  # (1, C, h, w)
        return torch.cat([cls, patches[0].flatten(1).T])


class TextTower(Tower):
    """Causal transformer. The end-of-text token is the first that has seen the whole caption, so it stands for it.

    A caption may be cut behind the longest of its B texts: its end never sees the padding. A text that is cut before
    its end gives a wrong [eot] without any error.
    """

    def __init__(self, config):
        super().__init__()
        C, layers = config.text_width, config.text_layers
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, C))
        self.transformer = Transformer(C, layers, config.text_heads, causal=True)
        self.norm = nn.LayerNorm(C)
        self.proj = nn.Parameter(C ** -0.5 * torch.randn(C, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        residual_std = (2 * C * layers) ** -0.5
        for block in self.transformer.resblocks:                        # CLIP's scaling, as released
            nn.init.normal_(block.attn.in_proj_weight, std=C ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * C) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def embed(self, groups):
        """Ids (n, T) -> the vectors of tokens and positions, (n, T, C), and the end, which has the largest id.

        One lookup for all captions, because the backward of each lookup fills a (vocab, C) gradient.
        """
        all_ids = torch.cat([ids.flatten() for ids in groups])
        vectors = self.token_embedding(all_ids).split([ids.numel() for ids in groups])
        for ids, x in zip(groups, vectors):
            n, T = ids.shape
            yield x.view(n, T, -1) + self.positional_embedding[:T], ids.argmax(dim=1)


# --- 7. Transformer: stack, block, attention (CLIP) ------------------------------------------------------------------

class Transformer(nn.Module):
    """A stack of blocks. In a causal one each row reads itself and the rows before it, else each reads all.

    `grad_checkpointing` saves memory: activations are computed again in the backward.
    """

    def __init__(self, width, layers, heads, causal=False):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.causal = causal
        self.grad_checkpointing = False

    def forward(self, x, row=None, csa=False):
        """x (n, L, C) -> (n, L, C). With `row` (n,) only that row of each sequence, (n, 1, C).

        The blocks before the last need every row, as keys and values. The last one computes only what is asked for.
        """
        mask = None
        if self.causal:
            L = x.shape[1]
            mask = x.new_ones(L, L, dtype=torch.bool).tril()            # True where a row may look
        *blocks, last = self.resblocks
        for block in blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return last(x, mask, row, csa)


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


def pick(x, row):
    """One row of each sequence: x (n, L, C), row (n,) -> (n, 1, C)."""
    return x.gather(1, row[:, None, None].expand(-1, 1, x.shape[2]))


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

    def forward(self, query, context, mask=None, csa=False):
        """query (n, Q, C) reads context (n, L, C) -> (n, Q, C). mask (Q, L) or (n, 1, Q, L), not with csa."""
        q, k, v = self.project(query, context)
        if csa:     # SCLIP: q with q, k with k. A patch attends to itself and to what looks like it
            x = (attention_weights(q, q) + attention_weights(k, k)) @ v
        elif q.device.type == 'cpu':
            x = attention_weights(q, k, mask) @ v
        else:       # the same in one kernel; on CPUs in bf16 it is up to 5 times as slow at short lengths
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def project(self, query, context):
        """query (n, Q, C), context (n, L, C) -> q (n, H, Q, d), k and v (n, H, L, d)."""
        C = query.shape[-1]
        weight_q, weight_kv = self.in_proj_weight.split([C, 2 * C])
        bias_q, bias_kv = self.in_proj_bias.split([C, 2 * C])
        q = F.linear(query, weight_q, bias_q)
        k, v = F.linear(context, weight_kv, bias_kv).chunk(2, dim=-1)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(self, x):
        """(n, L, C) -> (n, H, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attention_weights(q, k, mask=None):
    """softmax(q k^T / sqrt(d)): q (..., Q, d), k (..., L, d) -> (..., Q, L). mask is True where a key may be seen."""
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.transpose(-2, -1)                                    # (..., Q, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)


# --- 8. Names of the released code and of open_clip ------------------------------------------------------------------

RENAMES = {          # our prefix -> theirs; first match wins. They have the text tower at the root.
    'visual.norm.': 'visual.ln_post.',
    'text.norm.': 'ln_final.',
    'text.proj': 'text_projection',
    'image_cross.': 'visual.attn_cross_pool.',
    'text_cross.': 'text_attn_cross_pool.',
    'image_map.': 'image_token_mapping.',
    'text_map.': 'text_token_mapping.',
    'visual.': 'visual.',
    'logit_scale': 'logit_scale',
    'distill_logit_scale': 'distill_logit_scale',
    'text.': '',
}


def rename(state_dict, table):
    """Every key with its first matching prefix replaced; values pass untouched."""
    renamed = {}
    for key, value in state_dict.items():
        prefix = next(prefix for prefix in table if key.startswith(prefix))
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
    cls_t, eot_t = teacher(images[:2], texts[:2])
    loss = clip_loss(out, model.logit_scale.exp())
    loss = loss + cosmos_loss(out, cls_t, eot_t, model.distill_logit_scale.exp())
    loss.backward()
    teacher.update(model, momentum=0.999)
    for name, value in out._asdict().items():
        print(f'{name:14} {tuple(value.shape)}')
    print(f'loss           {loss.item():.4f} on noise; blind guessing among 4 pairs would be 2 ln 4 = 2.7726')
