"""COSMOS: cross-modality self-distillation for vision-language pre-training (CVPR 2025, arXiv 2412.01814).

CLIP squeezes an image and its text into one vector each, and matches the two. In such a vector big objects drown out
small ones. COSMOS takes several views of both: large and small crops of the image, and groups of one to five sentences
and single sentences of the text, which are called captions. A student network sees all of them. A teacher network, a
slow average of the student, sees only the global ones: the large crops and the groups. In the student, cross-attention
lets each vector of one modality attend to the tokens of the other. The result is added to the vector, and the sum is
trained to pick out its own pair's teacher vectors from those of the whole batch. CLIP's own loss is added. In this way
a sentence about a small object is meant to find that object in the image.

Symbols for shapes:
    B pairs on this GPU     N pairs on all GPUs             V image views, 2 global, then the local ones
    P patches               T tokens of a text, padded      U captions, 2 global, then the local ones
    W width of a tower      D width of the joint space      R rows of a sequence: T, P, or 1 + P with the class token
    Q query rows            H attention heads of width d    n sequences that go through a tower together
    s, p side of a view and of a patch, in pixels
Names taken from the paper:
    [cls], [eot]        the one vector of an image view, at the class token, and of a caption, at its end token
    C^I, C^T  the two cross-attention modules: C^I reads (attends to) the image, C^T reads the text
    h_I, h_T  the image's and the text's vectors after each has read the other modality, Eq. 1-2
              So the letters cross: C^T yields h_I, because the image asks and the text is read, and C^I yields h_T.
    cls_t, eot_t        the teacher's vectors of the images and of the texts
    L_CLIP, L_COSMOS    the two losses; training minimises their sum. Each is a mean of L_sym-nce (`match`)
Views come first, (V, B, D), and views 0 and 1 are the two globals. Code that serves both modalities says "view" and V
for captions, too. `ids` are token numbers, as a tokenizer gives them; `patches` and `words` are vectors of tokens.

One training step, with the names used in the code below (text_cross is C^T, image_cross is C^I):

    images: 2 global views, 6 local                               texts: 2 global captions, 6 local
           |                                                                        |
      VisionTower                                                               TextTower                    STUDENT
           |                                                                        |
     cls (V,B,D) -- query --> C^T: text_cross           C^I: image_cross <-- query -- eot (U,B,D)
           |                  reads the words           reads the patches           |
           |                  of caption 0              of view 0                   |
           |                         |                        |                     |
           |          h_I = C^T(..) + cls  Eq. 1   h_T = C^I(..) + eot  Eq. 2       |
           |                         |                        |                     |
           '--- global cls ----------|------ clip_loss -------|---- all eot --------'
                                     '----- cosmos_terms -----'
                                       h_I and h_T, each with cls_t and eot_t, Eq. 6
                                             |            |
      VisionTower -------------------- cls_t (2,B,D)  eot_t (2,B,D) ------------------ TextTower             TEACHER
      on the 2 global views           a moving average of the student,           on the 2 global captions
                                      no gradient, no cross-attention

    out = model(images, texts)    # student, all views and captions
    cls_t, eot_t = teacher(images[:GLOBALS], texts[:GLOBALS])           # teacher, globals only
    loss, parts = total_loss(model, out, cls_t, eot_t)                  # L_CLIP + L_COSMOS
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.clamp_scales()
    teacher.update(model, momentum)    # the paper's lambda, 0.999 at batch 1,024

Read it beside Section 3 of the paper. Parts 2-4 are COSMOS: student, teacher, losses. You can skip part 5 unless you
use several GPUs: on one GPU `gather` only returns each tensor as both queries and keys. Parts 6-7 are CLIP's towers
and transformer. If you know them, read only how a tower treats its views (class Tower).

We follow the released code (github.com/ExplainableML/cosmos); references such as `model.py:274` point into it. If the
paper is silent or differs, the released code decides, and a mark says so:
    code≠paper: the paper says something else.          paper silent: the paper does not say, as far as we know.
    code≠paper?: summaries of the paper say something else, so check your copy of it.
The last mark, `ours`, means that the decision is our own, because we differ from the released code on purpose or
because that code has nothing of the kind.
"""
import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --- 1. Configuration ------------------------------------------------------------------------------------------------

GLOBALS = 2  # global views of an image, and global captions. They come first, and the teacher sees no others.


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
    context_length: int = 77        # T of a caption at full length
    vocab_size: int = 49408         # CLIP's; the end-of-text token has the largest id
    cross_heads: int = 8            # attention heads inside C^I and C^T; with 0 the model has neither
    two_scales: bool = False        # a second scale, for the loss added to L_CLIP; with C^I and C^T always
    quick_gelu: bool = False        # the activation of OpenAI's CLIP; the released COSMOS models use GELU

    def __post_init__(self):
        for whole, part in (
                ('image_size', 'patch_size'), ('local_image_size', 'patch_size'), ('vision_width', 'vision_heads'),
                ('text_width', 'text_heads'), ('embed_dim', 'cross_heads')):
            size = getattr(self, whole)
            divisor = getattr(self, part)
            if divisor and size % divisor:              # cross_heads may be 0
                raise ValueError(f'{whole} {size} is not a multiple of {part} {divisor}')

# --- 2. The student ----------------------------------------------------------------------------- Sec. 3.2, Eq. 1-2 ---

class CrossAttention(nn.Module):
    """C^I or C^T: a single attention layer, with no MLP. In C^T the [cls] of every image view reads
    the words of caption 0; in C^I the [eot] of every caption reads the patches of view 0.

    The residual of Eq. 1-2 is added outside, in COSMOS.forward. The padding of a text is read as well (paper silent;
    transformer.py:210-230). The text tower is causal and the padding comes after the end, so the vectors at the padded
    positions have seen the whole caption: they are not noise, but further summaries of it.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)

    def forward(self, query, tokens):
        """query (V, B, D), not of unit length; tokens (B, R, D) -> (V, B, D).

        All views of a pair are queries in one call, so the pair's keys and values are projected only once.
        """
        query = self.ln_q(query).transpose(0, 1)                        # (B, V, D)
        return self.attn(query, self.ln_k(tokens)).transpose(0, 1)

    def weights(self, query, tokens):
        """query (B, D), not of unit length, tokens (B, R, D) -> weights (B, R), averaged over heads, summing to 1."""
        query = self.ln_q(query)[:, None]                               # (B, 1, D)
        q, k, _ = self.attn.project(query, self.ln_k(tokens))           # (B, H, 1 or R, d)
        weights = attention_weights(q, k)                               # (B, H, 1, R)
        return weights.mean(dim=1)[:, 0]


class Output(NamedTuple):
    """What the losses read, all of unit length. h_I and h_T are None in a model without cross-attention.

    In each tensor [:, b] belongs to pair b of the batch. Views and captions of a pair are never negatives of each
    other.
    """
    cls: torch.Tensor           # (V, B, D)  one vector for each image view
    eot: torch.Tensor           # (U, B, D)  one vector for each caption
    h_I: torch.Tensor = None    # (V, B, D)  each image view once it has read text, Eq. 1
    h_T: torch.Tensor = None    # (U, B, D)  each caption once it has read an image, Eq. 2


def unit(x):
    """Vectors of length 1, in float32 even in a bf16 or fp16 run: half precision would round every logit coarsely."""
    return F.normalize(x.float(), dim=-1)


class COSMOS(nn.Module):
    """Two towers, two linear maps, two cross-attentions, two learned scales. With cross_heads = 0 it is CLIP's model:
    two towers and one scale (or two, with config.two_scales).

    The towers are CLIP's. The maps bring patches and words to width D, for C^I and C^T to read. After training only the
    towers are needed: retrieval, classification and segmentation do without cross-attention.
    """

    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        self.config = config
        self.has_cross_attention = config.cross_heads > 0
        self.two_scales = self.has_cross_attention or config.two_scales
        self.visual = VisionTower(config)
        self.text = TextTower(config)
        initial_scale = torch.tensor(math.log(1 / 0.07))                  # ln(1/temperature)
        self.logit_scale = nn.Parameter(initial_scale)                  # L_CLIP
        if self.has_cross_attention:
            # paper silent: tokens go through a linear map before Eq. 1-2 (model.py:285-287, 331, 436)
            self.image_map = nn.Linear(config.vision_width, D)
            self.text_map = nn.Linear(config.text_width, D)
            self.image_cross = CrossAttention(D, config.cross_heads)    # C^I, reads patches
            self.text_cross = CrossAttention(D, config.cross_heads)     # C^T, reads words
        if self.two_scales:         # paper silent: L_COSMOS has a scale of its own (model.py:274)
            self.distill_logit_scale = nn.Parameter(initial_scale.clone())

    def forward(self, images, texts):
        """images: list of V (B, 3, s, s); texts: list of U (B, T) ids, or one tensor (U, B, T) -> Output.

        Every [cls] and every [eot] is a query. Keys and values come from view 0 and caption 0 only (code≠paper?:
        summaries say, from all globals; model.py:370-382). `words` covers all T positions, padding included, so caption
        0 must come at full length (paper silent; transformer.py:772-775). The others may be cut to save time, see
        TextTower.
        """
        if not self.has_cross_attention:
            return Output(unit(self.visual(images)), unit(self.text(texts)))
        cls, image_sequence = self.visual.with_sequence(images)         # (V, B, D), (B, 1 + P, W)
        eot, text_sequence = self.text.with_sequence(texts)             # (U, B, D), (B, T, W)
        patches = self.image_map(image_sequence[:, 1:])                 # (B, P, D)
        words = self.text_map(text_sequence)                            # (B, T, D)
        h_I = self.text_cross(cls, words) + cls         # (V, B, D)  Eq. 1: images read words
        h_T = self.image_cross(eot, patches) + eot      # (U, B, D)  Eq. 2: captions read patches
        # NB: in Eq. 6 h_T must find the image that it has read, h_I its caption: see page 3 of lesson/README.md.
        return Output(unit(cls), unit(eot), unit(h_I), unit(h_T))

    def encode_image(self, images):
        """images (B, 3, h, w), h and w multiples of p -> [cls] (B, D), patches (B, P, D), neither of unit length.

        These patches are what C^I reads. They do not live in the joint space, so do not compare them with texts; for
        that, use eval.encode_dense. If the model has no cross-attention, patches is None.
        """
        cls, sequence = self.visual.with_sequence([images])
        patches = self.image_map(sequence[:, 1:]) if self.has_cross_attention else None
        return cls[0], patches

    def encode_text(self, ids):
        """ids (B, T) -> [eot] (B, D), words (B, T, D), neither of unit length. If the model has no cross-attention,
        words is None."""
        eot, sequence = self.text.with_sequence([ids])
        words = self.text_map(sequence) if self.has_cross_attention else None
        return eot[0], words

    def attention(self, images, ids):
        """images (B, 3, h, w), ids (B, T) -> weights of C^I over patches (B, P), of C^T over words (B, T).

        The query of C^I is the caption, the query of C^T is the image. The paper's qualitative figures show such
        weights (paper silent: of the student or of the teacher, and whether heads are averaged). The weights over words
        include start, end and padding. The model must have cross-attention.
        """
        cls, patches = self.encode_image(images)
        eot, words = self.encode_text(ids)
        return self.image_cross.weights(eot, patches), self.text_cross.weights(cls, words)

    def scales(self):
        """The learned values of ln(1/temperature): first that of L_CLIP, then that of L_COSMOS if it has its own."""
        if self.two_scales:
            return [self.logit_scale, self.distill_logit_scale]
        return [self.logit_scale]

    @torch.no_grad()
    def clamp_scales(self):
        """Clamp the learned scales (logarithms) to [0, ln 100]; call this after each step. The bounds are the
        released code's."""
        for scale in self.scales():
            scale.clamp_(0, math.log(100))


# --- 3. The teacher ----------------------------------------------------------------------------- framework figure ---

class Teacher(nn.Module):
    """theta_t <- lambda theta_t + (1 - lambda) theta_s: an exponential moving average of the student, without gradient.

    With lambda = 0.999 the last 693 versions of the student carry half the weight. The teacher starts as a copy of the
    student. For teaching, only its two towers run. Cross-attention and scales are averaged as well, so that
    teacher.model is a complete model, which can be evaluated, and whose attention can be drawn.
    """

    def __init__(self, student):
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images, texts):
        """The global views and captions, lists of (B, 3, s, s) and (B, T) -> cls_t and eot_t, (2, B, D) each, of unit
        length."""
        return unit(self.model.visual(images)), unit(self.model.text(texts))

    @torch.no_grad()
    def update(self, student, momentum):
        """Move every parameter a fraction 1 - momentum of the way to the student's; momentum is the paper's lambda.

        ours, paper silent: we call it after optimizer.step, as DINO does. The released code calls it before, and so
        averages the student of one step earlier (there train.py:185-193 comes before 213-221).
        """
        # In place; one call for all parameters is faster than a call for each.
        averages = list(self.model.parameters())
        torch._foreach_lerp_(averages, list(student.parameters()), 1 - momentum)


# --- 4. The two losses ---------------------------------------------------------------------------------- Sec. 3.3 ---

# From this many logits on (67 MB), nce recomputes them in the backward pass. 1,024 pairs on one GPU with 2 x 8
# combinations of views have so many.
MANY_LOGITS = 2 ** 24


def nce(queries, keys, scale):
    """L_nce: each query must find the key of its own pair among all N. Averaged over the Vq x Vk combinations of views,
    and over the B pairs of this GPU.

    queries (Vq, B, D) of this GPU, keys (Vk, N, D) of all GPUs, of unit length; either side may be images or captions.
    scale = 1/temperature.

    By hand, with one view each: queries (1, 0) and (0, 1), keys (1, 0) and (0.6, 0.8), scale 1. The logits are
    [[1, 0.6], [0, 0.8]]. Query 0 costs ln(1 + e^-0.4) = 0.5130, query 1 ln(1 + e^-0.8) = 0.3711; the mean is 0.4421.
    With queries and keys exchanged it is ln(1 + e^-1) = 0.3133 and ln(1 + e^-0.2) = 0.5981; the mean is 0.4557.
    `match`, below, is the mean of both means: 0.4489.
    """
    Vq, B, _ = queries.shape
    Vk, N, _ = keys.shape
    # A query's right answer is the number of its own pair among all N. On several GPUs, where N > B, the pairs of this
    # one begin at rank * B.
    first_pair = dist.get_rank() * B if N > B else 0
    own_pair = torch.arange(first_pair, first_pair + B, device=queries.device)
    answers = own_pair.view(1, B, 1).expand(Vq, B, Vk).flatten()        # (Vq*B*Vk,)

    def cross_entropy(queries, keys, scale):        # a function, so that `checkpoint` can call it again
        with torch.autocast(queries.device.type, enabled=False):        # float32, even if called under autocast
            # Row (vq, b), column (vk, j) for pair j of N: all combinations of views in one product.
            logits = (scale * queries.flatten(0, 1)) @ keys.flatten(0, 1).T     # (Vq*B, Vk*N)
        # Row (vq, b, vk): query b of view vq chooses among the N keys of view vk.
        logits = logits.view(Vq, B, Vk, N).flatten(0, 2)                # (Vq*B*Vk, N)
        return F.cross_entropy(logits, answers)

    if Vq * B * Vk * N < MANY_LOGITS:
        return cross_entropy(queries, keys, scale)
    # ours: we do not keep so many logits, because with 4,096 pairs on one GPU the ten L_nce of a step would need 11 GB
    # for them. The backward pass recomputes them, one L_nce at a time.
    return checkpoint(cross_entropy, queries, keys, scale,
                      use_reentrant=False, preserve_rng_state=False)


def match(a, b, scale):
    """L_sym-nce(a, b) = (L_nce(a, b) + L_nce(b, a)) / 2. a and b come from `gather`, so their queries are this GPU's
    vectors and their keys are all GPUs' vectors.

    On several GPUs each computes the mean over its own B pairs, and the loss is the mean over GPUs.
    """
    return (nce(a.queries, b.keys, scale) + nce(b.queries, a.keys, scale)) / 2


def clip_loss(out, scale):
    """L_CLIP: the student's global images with all its captions, 2 x 8 combinations of views in the released
    recipe. scale = exp(logit_scale).

    It is CLIP's loss on [cls] and [eot], and cross-attention has no part in it.

    code≠paper?: local image views stay out, because with them the authors saw overfitting (loss.py:203-206).
    """
    cls, eot = gather(out.cls[:GLOBALS], out.eot)
    return match(cls, eot, scale)


def cosmos_terms(out, cls_t, eot_t, scale):
    """The four terms of L_COSMOS by name.                                                            Sec. 3.3, Eq. 6

    Every term compares all student views with both teacher views, 8 x 2 combinations in the released recipe. In
    h_I_cls_t and h_T_eot_t a view also meets itself, 0 with 0 and 1 with 1 (paper silent; loss.py:131-139); DINO leaves
    these out. scale = exp(distill_logit_scale).
    """
    h_I, h_T = gather(out.h_I, out.h_T)
    cls_t, eot_t = gather(cls_t, eot_t)     # a separate call, because these need no gradient
    return {
        'h_I_cls_t': match(h_I, cls_t, scale),
        'h_I_eot_t': match(h_I, eot_t, scale),
        'h_T_cls_t': match(h_T, cls_t, scale),
        'h_T_eot_t': match(h_T, eot_t, scale)}


def cosmos_loss(out, cls_t, eot_t, scale):
    """L_COSMOS, the mean of the four terms. Training calls total_loss, which weights them one by one."""
    terms = cosmos_terms(out, cls_t, eot_t, scale)
    return sum(terms.values()) / len(terms)


def total_loss(model, out, cls_t, eot_t, terms=cosmos_terms):
    """The loss of a step, L_CLIP + L_COSMOS -> scalar, and its parts {name: (weight, term)}, which the log shows.

    terms: a function such as cosmos_terms, which returns what is added to L_CLIP; train.py has others. All its terms
    get the same weight, so with a fifth one each gets 1/5. For a term with a weight of its own add a line before the
    sum: parts['name'] = (weight, term).
    """
    parts = {'clip': (1, clip_loss(out, model.logit_scale.exp()))}
    scale = model.scales()[-1].exp()        # that of L_COSMOS or, if it has none of its own, that of L_CLIP
    distilled = terms(out, cls_t, eot_t, scale)
    for name, term in distilled.items():
        parts[name] = (1 / len(distilled), term)        # a quarter each, for the four of Eq. 6
    loss = sum(weight * term for weight, term in parts.values())
    return loss, parts


# --- 5. Across GPUs: this GPU's pairs against all GPUs' pairs --------------------------------------------------------

class Gathered(NamedTuple):
    """The same vectors in the two roles of an L_nce. On one GPU both are the same tensor."""
    queries: torch.Tensor       # (V, B, D)  this GPU's
    keys: torch.Tensor          # (V, N, D)  all GPUs'


def gather(*vectors):
    """Several tensors (V, B, D) -> a Gathered for each; one collective serves them all.

    The released code has two collectives for each combination of views, 2 x 8 in L_CLIP and 4 x 16 in L_COSMOS.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [Gathered(x, x) for x in vectors]
    all_keys = Gather.apply(torch.cat(vectors)).split([len(x) for x in vectors])
    return [Gathered(x, keys) for x, keys in zip(vectors, all_keys)]


class Gather(torch.autograd.Function):
    """(V, B, D) on every rank -> (V, N, D) on all of them; each gradient goes back to the rank that its vector came
    from. B is equal on all ranks.

    ours: the gradient is exact. Each rank computes the loss of its own pairs, which depends on the vectors of every
    rank. So the backward pass sums, for each vector, the gradients that all ranks have for it. DDP then takes the mean
    over ranks, and the result is the gradient of the mean loss.

    In the released code it is divided by the number of ranks, except for the two scales. AdamW cancels such a factor,
    apart from the effect of its eps. See docs/differences.md.
    """

    @staticmethod
    def forward(ctx, x):
        V, B, D = x.shape
        ctx.B = B
        ranks = dist.get_world_size()
        gathered = x.new_empty(ranks * V, B, D)
        # In torch versions without all_gather_single the same collective is called all_gather_into_tensor.
        all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor
        all_gather(gathered, x.contiguous())
        return gathered.view(ranks, V, B, D).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()            # all_reduce writes into it
        dist.all_reduce(grad)
        return grad.narrow(1, dist.get_rank() * ctx.B, ctx.B)


# --- 6. The two towers (CLIP) ----------------------------------------------------------------------------------------

def join_same_size(views):
    """Neighbouring views of the same size, joined: sizes 224, 96, 96, 96 -> two tensors, (B, ...) and (3 B, ...)."""
    return [torch.cat(list(group)) for _, group in groupby(views, key=lambda view: view.shape)]


class Tower(nn.Module):
    """What both towers do with their views.

    Only one row of a view's sequence becomes its vector: the class token's row, or in a text the end token's. So the
    last block computes this row alone, which saves a fifth of the multiplications in train.py's preset `tiny`, and a
    few percent in deeper towers; the result is the same. Cross-attention needs the other rows of view 0, too, so
    `with_sequence` computes them all.

    A tower has `embed`, `transformer`, `norm` and `proj`. `embed` takes a list of tensors, each with n images or
    captions of one size. For each it returns the sequences (n, R, W) and `row` (n,), the row that becomes the vector.
    """

    def forward(self, views):
        """views: list of V (B, ...); neighbours of the same size share a pass -> [cls] or [eot] (V, B, D)."""
        vectors = []
        for x, row in self.embed(join_same_size(views)):
            vectors.append(self.vector(x, row))
        return torch.cat(vectors).unflatten(0, (len(views), -1))        # view 0's B vectors come first

    def with_sequence(self, views):
        """-> [cls] or [eot] of all views (V, B, D), and all rows of view 0 after `norm` (B, R, W).

        View 0 goes through on its own, and all its rows are computed; the others go through as in `forward`.
        """
        first, *others = self.embed([views[0], *join_same_size(views[1:])])
        x, row = first
        sequence = self.norm(self.transformer(x))                       # (B, R, W)
        vectors = [pick(sequence, row)[:, 0] @ self.proj]
        for x, row in others:
            vectors.append(self.vector(x, row))
        return torch.cat(vectors).unflatten(0, (len(views), -1)), sequence

    def vector(self, x, row):
        """Sequences x (n, R, W), row (n,) -> [cls] or [eot] (n, D)."""
        x = self.transformer(x, row)                                    # (n, 1, W)
        return self.norm(x[:, 0]) @ self.proj


class VisionTower(Tower):
    """ViT. The rows of a sequence are the class token, then the patches."""

    def __init__(self, config):
        super().__init__()
        W = config.vision_width
        std = W ** -0.5
        self.patch_size = p = config.patch_size
        self.grid = config.image_size // p
        self.conv1 = nn.Conv2d(3, W, kernel_size=p, stride=p, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(W))
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + self.grid ** 2, W))
        self.ln_pre = nn.LayerNorm(W)
        self.transformer = Transformer(W, config.vision_layers, config.vision_heads, config.quick_gelu)
        self.norm = nn.LayerNorm(W)
        self.proj = nn.Parameter(std * torch.randn(W, config.embed_dim))

    def embed(self, groups):
        """groups: tensors of images (n, 3, height, width) -> for each the sequences (n, 1 + P, W), with positions
        added, and the row (n,) of the class token, 0."""
        p = self.patch_size
        embedded = []
        for images in groups:
            n, _, height, width = images.shape
            if height % p or width % p:
                raise ValueError(f'an image of {height} x {width} pixels cannot be cut into patches of {p}; '
                                 f'resize or pad it to multiples of {p}')
            # Patches do not overlap, so conv1 is a matrix product. In bf16 on CPUs that is 3 to 5 times as fast as the
            # convolution.
            cells = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (n, 3, rows, p, columns, p)
            in_order = cells.permute(0, 2, 4, 1, 3, 5)                  # (n, rows, columns, 3, p, p)
            pixels = in_order.flatten(3).flatten(1, 2)                  # (n, P, 3 * p * p)
            patches = F.linear(pixels, self.conv1.weight.flatten(1))    # (n, P, W)
            cls = self.class_embedding.expand(n, 1, -1)
            x = torch.cat([cls, patches], dim=1) + self.positions(height // p, width // p)
            class_row = torch.zeros(n, dtype=torch.long, device=x.device)
            embedded.append((self.ln_pre(x), class_row))
        return embedded

    def positions(self, h, w):
        """Position embeddings for an h x w grid of patches, (1 + h*w, W): the learned ones if that is the training
        grid, otherwise interpolated between them (bicubic)."""
        grid = self.grid
        if h == w == grid:
            return self.positional_embedding
        cls, patches = self.positional_embedding.split([1, grid ** 2])
        patches = patches.T.unflatten(1, (grid, grid))[None]            # (1, W, grid, grid)
        # paper silent (transformer.py:646-669): like DINO, the released code adds 0.1, so that rounding never loses a
        # row of the grid. This also stretches the grid a little. The released weights were trained with the 0.1, so it
        # must stay.
        zoom = (h + 0.1) / grid, (w + 0.1) / grid
        patches = F.interpolate(patches, scale_factor=zoom, mode='bicubic')  # (1, W, h, w)
        return torch.cat([cls, patches[0].flatten(1).T])


class TextTower(Tower):
    """Causal transformer. The end-of-text token is the first that has seen the whole caption, and stands for it.

    If only [eot] is needed, a tensor of B texts may be cut off where the longest one ends. Attention is causal, so an
    end token never sees the padding after it. A text that is cut before its end gives a wrong [eot] without any error.
    """

    def __init__(self, config):
        super().__init__()
        W, layers = config.text_width, config.text_layers
        self.token_embedding = nn.Embedding(config.vocab_size, W)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, W))
        self.transformer = Transformer(W, layers, config.text_heads, config.quick_gelu, causal=True)
        self.norm = nn.LayerNorm(W)
        self.proj = nn.Parameter(W ** -0.5 * torch.randn(W, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        residual_std = (2 * W * layers) ** -0.5
        for block in self.transformer.resblocks:                    # CLIP's scaling, as released
            nn.init.normal_(block.attn.in_proj_weight, std=W ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * W) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def embed(self, groups):
        """groups: tensors of ids (n, T) -> for each the sequences (n, T, W), with positions added, and the row (n,) of
        the end-of-text token, which has the largest id.

        One lookup for all captions, because in the backward pass each lookup allocates a (vocab, W) gradient.
        """
        all_ids = torch.cat([ids.flatten() for ids in groups])
        vectors = self.token_embedding(all_ids).split([ids.numel() for ids in groups])
        embedded = []
        for ids, x in zip(groups, vectors):
            n, T = ids.shape
            x = x.view(n, T, -1) + self.positional_embedding[:T]
            embedded.append((x, ids.argmax(dim=1)))
        return embedded


# --- 7. Transformer: stack, block, attention (CLIP) ------------------------------------------------------------------

class Transformer(nn.Module):
    """A stack of blocks. If causal, each row attends to itself and the rows before it, otherwise to every row.

    `grad_checkpointing` saves memory: all blocks but the last are recomputed in the backward pass.
    """

    def __init__(self, width, layers, heads, quick_gelu, causal=False):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, quick_gelu) for _ in range(layers))
        self.causal = causal
        self.grad_checkpointing = False

    def forward(self, x, row=None):
        """x (n, R, W) -> (n, R, W). With `row` (n,) only that row of each sequence, (n, 1, W).

        The blocks before the last must compute every row, because the next one reads them as keys and values.
        """
        *blocks, last = self.resblocks
        for block in blocks:
            # A block draws no random numbers, so their state need not be kept.
            if self.grad_checkpointing:
                x = checkpoint(block, x, self.causal,
                               use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, self.causal)
        return last(x, self.causal, row)


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU. If weights were trained with GELU and run with QuickGELU, or the reverse, nothing
    fails, but the scores drop."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(LN x), then x + MLP(LN x). GELU is exact, as in the released models,
    unless `quick_gelu` is set."""

    def __init__(self, width, heads, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, causal=False, row=None):
        """x (n, R, W) -> (n, R, W). With `row` (n,) only that row of each sequence is computed, (n, 1, W).

        All rows are keys and values either way, so the result is the same as if all were computed and one taken.
        """
        context = query = self.ln_1(x)                                  # (n, R, W)
        if row is None:
            x = x + self.attn(query, context, causal=causal)
        else:
            x = pick(x, row)                                            # (n, 1, W)
            query = pick(context, row)                                  # (n, 1, W)
            mask = None
            if causal:
                keys = torch.arange(context.shape[1], device=row.device)
                mask = (keys <= row[:, None])[:, None, None]            # (n, 1, 1, R)
            x = x + self.attn(query, context, mask)
        return x + self.mlp(self.ln_2(x))


def pick(x, row):
    """One row of each sequence: x (n, R, W), row (n,) -> (n, 1, W)."""
    return x.gather(1, row[:, None, None].expand(-1, 1, x.shape[2]))


class Attention(nn.MultiheadAttention):
    """Attention(width, heads) has the parameters of torch's multi-head attention, but its own forward pass, because we
    need q, k and v themselves: for the weights that the pictures show, and for segmentation in eval.py.

    in_proj_weight (3 W, W) stacks the matrices of query, key and value, and in_proj_bias (3 W) stacks their biases.
    out_proj is the linear map at the end.
    """

    def forward(self, query, context, mask=None, causal=False):
        """query (n, Q, W) reads context (n, R, W) -> (n, Q, W). Q is R, or 1 in a last block, or V in cross-attention.

        mask: True for keys that may be seen (in nn.MultiheadAttention it is the opposite), such as (n, 1, 1, R) for one
        row of each sequence. causal, in place of a mask: row i of a whole sequence sees rows 0 to i.
        """
        q, k, v = self.project(query, context)
        # Plain products on two devices: in bf16 on a CPU they are up to 5 times as fast as the kernels below, and on
        # mps is_causal may let a row see later ones in half precision (pytorch#195910).
        if q.device.type in ('cpu', 'mps'):
            if causal:
                R = k.shape[2]
                mask = k.new_ones(R, R, dtype=torch.bool).tril()        # True where a row may look
            x = attention_weights(q, k, mask) @ v
        else:       # the flash kernel takes no mask, but knows the causal one
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def project(self, query, context):
        """query (n, Q, W), context (n, R, W) -> q (n, H, Q, d), k and v (n, H, R, d)."""
        W = query.shape[-1]
        weight_q, weight_kv = self.in_proj_weight.split([W, 2 * W])
        bias_q, bias_kv = self.in_proj_bias.split([W, 2 * W])
        q = F.linear(query, weight_q, bias_q)
        k, v = F.linear(context, weight_kv, bias_kv).chunk(2, dim=-1)
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]


def attention_weights(q, k, mask=None):
    """softmax(q k^T / sqrt(d)): q (..., Q, d), k (..., R, d) -> (..., Q, R). mask is True where a key may be seen."""
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.transpose(-2, -1)                                    # (..., Q, R)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)


if __name__ == '__main__':  # python cosmos.py: forward and backward on noise; prints shapes and the parts of the loss
    torch.manual_seed(0)
    config = Config(image_size=48, local_image_size=24, patch_size=8, vision_layers=2, text_layers=2, vocab_size=1000)
    model = COSMOS(config)
    teacher = Teacher(model)
    B = 3
    sides = [config.image_size] * GLOBALS + [config.local_image_size] * 3
    images = [torch.randn(B, 3, side, side) for side in sides]          # V = 5
    texts = torch.randint(1, 1000, (GLOBALS + 2, B, 77))                # U = 4; the largest id ends a text
    out = model(images, texts)
    cls_t, eot_t = teacher(images[:GLOBALS], texts[:GLOBALS])
    loss, parts = total_loss(model, out, cls_t, eot_t)
    loss.backward()
    for name, value in out._asdict().items():
        print(f'{name:10} {tuple(value.shape)}')
    for name, (weight, term) in parts.items():
        print(f'{name:10} {weight} x {term.item():.4f}')
    print(f'loss       {loss.item():.4f} on noise; guessing costs ln {B} in L_CLIP and ln {B} in L_COSMOS, together '
          f'{2 * math.log(B):.4f}')
