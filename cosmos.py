"""COSMOS: cross-modality self-distillation for vision-language pre-training (CVPR 2025, arXiv 2412.01814).

CLIP squeezes an image and its text into one vector each, and matches the two. Large objects dominate such a vector, and
small ones are lost. COSMOS takes several views of both: from the image large (global) and small (local) crops, from the
text global captions of one to five sentences and local captions of one sentence. A student network sees all of them. A
teacher network, a slow average of the student, sees only the global ones. In the student, cross-attention lets each
vector of one modality attend to the tokens of the other. The result is added to the vector. The sum and its pair's
teacher vectors must find each other in the batch. CLIP's own loss is added. Small objects shall not be lost any more.

Symbols for shapes:
    B pairs on this GPU     N pairs on all GPUs             V image views, 2 global, then the local ones
    P patches               T tokens of a text, padded      U captions, 2 global, then the local ones
    W width of a tower      D width of the joint space      R rows (tokens) of a sequence: T, P, or 1 + P
    Q query rows            H attention heads of width d    n sequences that go through a tower together
    s, p side of a view and of a patch, in pixels
The paper's names, as our sources give them:
    [cls], [eot]        the vector of an image view, from its class token; that of a caption, from its end token
    cls_t, eot_t        the teacher's vectors of the images and of the texts (small t: teacher)
    L_sym-nce           CLIP's loss: in a batch each vector must find its partner, in both directions (`match`)
    L_CLIP, L_COSMOS    one L_sym-nce, and the mean of four. Their sum is trained
    C^T, C^I            the two cross-attention modules. C^T reads text and makes h_I; C^I reads an image and makes h_T:

    who asks            what it reads            module               result
    an image, its cls   words of caption 0       C^T = read_text      h_I, an image that has read text, Eq. 1
    a text, its eot     patches of view 0        C^I = read_image     h_T, a text that has read an image, Eq. 2

Views come first, (V, B, D), and views 0 and 1 are the two globals. Code that serves both modalities says "view" and V
for captions, too. `ids` are token numbers, as a tokenizer gives them; `patches` and `words` are vectors of tokens.

One training step, with the names used in the code below:

    images: 2 global views, 6 local                               texts: 2 global captions, 6 local
           |                                                                        |
      VisionTower                                                               TextTower                    STUDENT
           |                                                                        |
     cls (V,B,D) --- global views --------- clip_loss -------- all captions --- eot (U,B,D)
           |                                                                        |
           | query                                                                  | query
           v                                                                        v
     C^T: read_text reads words of caption 0         C^I: read_image reads patches of view 0
           |                                                                        |
     h_I (V,B,D)  Eq. 1 ------------------ cosmos_terms ----------------- h_T (U,B,D)  Eq. 2
                           h_I and h_T must each find cls_t and eot_t: Eq. 6
                                             |            |
      VisionTower -------------------- cls_t (2,B,D)  eot_t (2,B,D) ------------------ TextTower             TEACHER
      on the 2 global views           a moving average of the student,           on the 2 global captions
                                      no gradient, no cross-attention

    out = student(images, texts)                        # all views and captions
    cls_t, eot_t = teacher(images[:GLOBALS], texts[:GLOBALS])           # teacher, globals only
    loss, terms = total_loss(student, out, cls_t, eot_t)                # L_CLIP + L_COSMOS
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    student.clamp_scales()
    teacher.update(student, momentum)                   # the paper's lambda, 0.999 at batch 1,024

Read it beside Section 3 of the paper. Parts 2-4 are COSMOS: student, teacher, losses. You can skip part 5 unless you
use several GPUs: on a single GPU `gather` changes nothing. Parts 6-7 are CLIP's towers and transformer. If you know
them, read only class Tower: how views share a pass.

We follow the released code (github.com/ExplainableML/cosmos): references such as `model.py:274` point into it, and "as
released" means as in it. We did not have the paper's text, but sources about it, which docs/differences.md lists.
There are three marks:
    paper silent: our sources do not mention it.        code≠paper: one of our sources contradicts the code.
    ours: we differ from the released code on purpose, or it has no counterpart.
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

# --- 1. Configuration ------------------------------------------------------------------------------------------------

GLOBALS = 2  # global views of an image, and global captions. They come first, and the teacher sees no others.


@dataclass(frozen=True)
class Config:
    """The sizes of a model and of its views. Sides of images must be divisible by patch_size, each width by its number
    of heads."""
    embed_dim: int = 512            # D, the joint space of images and texts
    image_size: int = 224           # side of a global view, in pixels
    local_image_size: int = 96      # side of a local view
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77        # T of a caption at full length
    vocab_size: int = 49408         # CLIP's
    cross_heads: int = 8            # attention heads inside C^I and C^T; 0: no C^I and C^T
    two_scales: bool = False        # L_COSMOS has its own scale also without C^I and C^T; with them it always has
    quick_gelu: bool = False        # the activation of OpenAI's CLIP; the released COSMOS models use GELU


# --- 2. The student ----------------------------------------------------------------------------- Sec. 3.2, Eq. 1-2 ---

class CrossAttention(nn.Module):
    """C^I or C^T: a single attention layer, with no MLP. In C^T the [cls] of every image view reads the words of
    caption 0; in C^I the [eot] of every caption reads the patches of view 0.

    The residual of Eq. 1-2 is added outside, in COSMOS.read. Attention stands in part 7: `attn(query, context)` lets
    every row of the query attend to the rows of the context, and `project` gives its q, k and v. The text tower is
    causal, so the vectors at padded positions have seen the whole caption. C^T reads them, too (paper silent;
    transformer.py:210-230), so do not cut caption 0.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)

    def forward(self, query, tokens):
        """query (V, B, D), tokens (B, R, D) -> (V, B, D), all unnormalised."""
        query = self.ln_q(query).transpose(0, 1)                        # (B, V, D): a pair's views share its keys
        return self.attn(query, self.ln_k(tokens)).transpose(0, 1)

    def weights(self, query, tokens):
        """query (B, D), tokens (B, R, D), unnormalised -> weights (B, R), averaged over heads, summing to 1."""
        query = self.ln_q(query)[:, None]                               # (B, 1, D)
        q, k, _ = self.attn.project(query, self.ln_k(tokens))           # (B, H, 1 or R, d)
        weights = attention_weights(q, k)                               # (B, H, 1, R)
        return weights.mean(dim=1)[:, 0]


class Output(NamedTuple):
    """What the losses compare, all of unit length. h_I and h_T are None in a model without cross-attention. In each
    tensor [:, b] belongs to pair b of the batch. Views and captions of a pair are never negatives of each other."""
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
        self.has_cross_attention = bool(config.cross_heads)
        self.has_two_scales = self.has_cross_attention or config.two_scales
        self.visual = VisionTower(config)
        self.text = TextTower(config)
        initial = math.log(1 / 0.07)                                    # all scales are learned as ln(1/temperature)
        self.logit_scale = nn.Parameter(torch.tensor(initial))          # L_CLIP
        if self.has_cross_attention:
            # paper silent: tokens go through a linear map before Eq. 1-2 (model.py:285-287, 331, 436)
            self.image_map = nn.Linear(config.vision_width, D)
            self.text_map = nn.Linear(config.text_width, D)
            self.read_image = CrossAttention(D, config.cross_heads)     # C^I
            self.read_text = CrossAttention(D, config.cross_heads)      # C^T
        if self.has_two_scales:     # paper silent: L_COSMOS has a scale of its own (model.py:274)
            self.distill_logit_scale = nn.Parameter(torch.tensor(initial))

    def forward(self, images, texts):
        """images: list of V (B, 3, s, s); texts: list of U (B, T) ids, or one tensor (U, B, T) -> Output."""
        cls, eot, patches, words = self.encode(images, texts)
        if not self.has_cross_attention:
            return Output(unit(cls), unit(eot))
        h_I, h_T = self.read(cls, eot, patches, words)
        return Output(unit(cls), unit(eot), unit(h_I), unit(h_T))

    def encode(self, images, texts):
        """Images and texts as in `forward` -> cls (V, B, D), eot (U, B, D), and the keys and values of cross-attention:
        patches (B, P, D) of view 0 and words (B, T, D) of caption 0; both None without cross-attention. All are
        unnormalised.

        code≠paper: two walk-throughs of the paper say that keys and values come from all global views; in the released
        code they come from view 0 and caption 0 only (model.py:370-382). The other captions may be cut, see TextTower.
        """
        if not self.has_cross_attention:
            return torch.stack(self.visual(images)), torch.stack(self.text(texts)), None, None
        # View 0 and caption 0 go through their towers alone, because only they need all their tokens.
        first_cls, patches = self.encode_image(images[0])               # (B, D), (B, P, D)
        first_eot, words = self.encode_text(texts[0])                   # (B, D), (B, T, D)
        cls = torch.stack([first_cls, *self.visual(images[1:])])        # (V, B, D)
        eot = torch.stack([first_eot, *self.text(texts[1:])])           # (U, B, D)
        return cls, eot, patches, words

    def read(self, cls, eot, patches, words):
        """cls (V, B, D), eot (U, B, D), patches (B, P, D), words (B, T, D) -> h_I, h_T like cls, eot; all unnormalised.

        NB: Two terms of Eq. 6 can be solved by copying. h_T must find the cls_t of the very image that it has read, so
        what C^I returns may suffice, whatever the caption says; likewise h_I and eot_t. lesson/README.md measures this.
        """
        h_I = self.read_text(cls, words) + cls          # (V, B, D)  Eq. 1: images read words
        h_T = self.read_image(eot, patches) + eot       # (U, B, D)  Eq. 2: captions read patches
        return h_I, h_T

    def encode_image(self, images):
        """images (B, 3, h, w), h and w multiples of p -> [cls] (B, D), patches (B, P, D), unnormalised.

        These patches are what C^I reads; without cross-attention they are None. They do not live in the joint space, so
        do not compare them with texts; for that, use eval.encode_dense.
        """
        cls, sequence = self.visual.with_sequence(images)               # (B, D), (B, 1 + P, W)
        patches = self.image_map(sequence[:, 1:]) if self.has_cross_attention else None
        return cls, patches

    def encode_text(self, ids):
        """ids (B, T) -> [eot] (B, D), words (B, T, D), unnormalised; words is None without cross-attention."""
        eot, sequence = self.text.with_sequence(ids)                    # (B, D), (B, T, W)
        words = self.text_map(sequence) if self.has_cross_attention else None
        return eot, words

    def attention(self, images, ids):
        """images (B, 3, h, w), ids (B, T) -> weights of C^I over patches (B, P), of C^T over words (B, T).

        The query of C^I is the caption, the query of C^T is the image. The paper's qualitative figures show such
        weights (paper silent: of the student or of the teacher, and whether heads are averaged).
        """
        cls, patches = self.encode_image(images)
        eot, words = self.encode_text(ids)
        return self.read_image.weights(eot, patches), self.read_text.weights(cls, words)

    def log_scales(self):
        """The learned values of ln(1/temperature): that of L_CLIP, and that of L_COSMOS if it has its own."""
        if self.has_two_scales:
            return [self.logit_scale, self.distill_logit_scale]
        return [self.logit_scale]

    @torch.no_grad()
    def clamp_scales(self):
        """Clamp the learned scales (logarithms) to [0, ln 100] after each step, as released."""
        for log_scale in self.log_scales():
            log_scale.clamp_(0, math.log(100))


# --- 3. The teacher ----------------------------------------------------------------------------- framework figure ---

class Teacher(nn.Module):
    """theta_t <- lambda theta_t + (1 - lambda) theta_s: an exponential moving average of the student, without gradient.

    The teacher starts as a copy of the student. Training uses only its two towers. Cross-attention and scales are
    averaged as well, so that teacher.model is complete: it can be evaluated, and its attention can be drawn.
    """

    def __init__(self, student):
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images, texts):
        """Lists of views (B, 3, s, s) and captions (B, T), as a rule the 2 + 2 globals -> cls_t and eot_t, (2, B, D)
        each, of unit length: a vector for each view, and for each caption."""
        cls_t = torch.stack(self.model.visual(images))
        eot_t = torch.stack(self.model.text(texts))
        return unit(cls_t), unit(eot_t)

    @torch.no_grad()
    def update(self, student, momentum):
        """Move every parameter a fraction 1 - momentum of the way to the student's; momentum is the paper's lambda.

        ours, paper silent: we call it after optimizer.step, as DINO does. The released code calls it before, and so
        averages the student of one step earlier (there train.py:185-193 comes before 213-221).
        """
        # One call for all parameters is faster than one for each.
        torch._foreach_lerp_(list(self.model.parameters()), list(student.parameters()), 1 - momentum)


# --- 4. The two losses ---------------------------------------------------------------------------------- Sec. 3.3 ---

def nce(queries, keys, scale):
    """L_nce: each query must find the key of its own pair among all N. The mean over Vq x Vk combinations of views, and
    over this GPU's B pairs.

    queries (Vq, B, D) of this GPU, keys (Vk, N, D) of all GPUs, of unit length; either side may be images or captions.
    scale = 1/temperature. The pairs of this GPU begin at rank * B of the N. Float32, even under autocast.

    By hand, with one view each: queries (1, 0) and (0, 1), keys (1, 0) and (0.6, 0.8), scale 1. The logits are
    [[1, 0.6], [0, 0.8]]. Query 0 costs ln(1 + e^-0.4) = 0.5130, query 1 ln(1 + e^-0.8) = 0.3711; the mean is 0.4421.
    With queries and keys exchanged it is ln(1 + e^-1) = 0.3133 and ln(1 + e^-0.2) = 0.5981; the mean is 0.4557.
    `match`, below, is the mean of both means: 0.4489.
    """
    Vq, B, _ = queries.shape
    Vk = len(keys)
    with torch.autocast(queries.device.type, enabled=False):
        logits = torch.einsum('qbd,knd->qkbn', scale * queries, keys)   # (Vq, Vk, B, N)
    # A query's right answer is the number of its own pair among all N.
    first_pair = dist.get_rank() * B if has_other_ranks() else 0
    own_pair = torch.arange(first_pair, first_pair + B, device=queries.device)
    return F.cross_entropy(logits.flatten(0, 2), own_pair.repeat(Vq * Vk))      # (Vq Vk B, N); own_pair repeats


def match(a, b, scale):
    """L_sym-nce(a, b) = (L_nce(a, b) + L_nce(b, a)) / 2. a and b are Gathered (part 5): they have the vectors of this
    GPU as `queries`, and those of all GPUs as `keys`. On one GPU both are the same tensor."""
    return (nce(a.queries, b.keys, scale) + nce(b.queries, a.keys, scale)) / 2


def clip_loss(out, scale):
    """L_CLIP: the student's global images with all its captions, 2 x 8 combinations of views in the released
    recipe. scale = exp(logit_scale). Cross-attention has no part in it.

    code≠paper: a walk-through of the paper uses all views here. The code leaves local image views out, because with
    them its authors saw overfitting (loss.py:203-206).
    """
    cls, eot = gather(out.cls[:GLOBALS], out.eot)
    return match(cls, eot, scale)


def cosmos_terms(out, cls_t, eot_t, scale):
    """The four terms of L_COSMOS by name.                                                            Sec. 3.3, Eq. 6

    Every term compares all student views with both teacher views, 8 x 2 combinations in the released recipe. h_I_cls_t
    and h_T_eot_t include a view against its own teacher vector, 0 with 0 and 1 with 1 (paper silent; loss.py:131-139);
    DINO skips those. scale = exp(distill_logit_scale).
    """
    h_I, h_T = gather(out.h_I, out.h_T)
    cls_t, eot_t = gather(cls_t, eot_t)     # apart: these need no gradient, so no all_reduce
    return {
        'h_I_cls_t': match(h_I, cls_t, scale),
        'h_I_eot_t': match(h_I, eot_t, scale),
        'h_T_cls_t': match(h_T, cls_t, scale),
        'h_T_eot_t': match(h_T, eot_t, scale)}


def cosmos_loss(out, cls_t, eot_t, scale):
    """L_COSMOS, the mean of the four terms. Training does not call this: total_loss weighs the terms itself."""
    terms = cosmos_terms(out, cls_t, eot_t, scale)
    return sum(terms.values()) / len(terms)


def term_weights(names, clip_weight=1):
    """What the total loss multiplies each term by, {name: weight}. names: those of the terms, 'clip' among them.

    L_CLIP and L_COSMOS both weigh 1, in the released code and in the paper, and L_COSMOS is the mean of its terms. To
    weigh one term differently, add a branch for its name: the loss, the log and the report all ask this function.
    """
    weights = {}
    for name in names:
        if name == 'clip':
            weights[name] = clip_weight
        else:
            weights[name] = 1 / (len(names) - 1)
    return weights


def total_loss(student, out, cls_t, eot_t, method_terms=cosmos_terms, clip_weight=1):
    """-> the loss of a step, a scalar, by default L_CLIP + L_COSMOS; and {name: term}, unweighted, which the log shows.
    method_terms: cosmos_terms, or another function that gives the terms to add to L_CLIP, by name. train.py has others;
    that of CLIP alone gives {}. clip_weight: 0 trains without L_CLIP."""
    log_scale = student.distill_logit_scale if student.has_two_scales else student.logit_scale
    terms = {'clip': clip_loss(out, student.logit_scale.exp())}
    terms |= method_terms(out, cls_t, eot_t, log_scale.exp())
    weights = term_weights(terms, clip_weight)
    weighted = {name: weights[name] * term for name, term in terms.items()}
    loss = weighted.pop('clip') + sum(weighted.values())
    return loss, terms


# --- 5. Across GPUs: this GPU's pairs against all GPUs' pairs --------------------------------------------------------

class Gathered(NamedTuple):
    """The same vectors in the two roles of an L_nce. On one GPU both are the same tensor."""
    queries: torch.Tensor       # (V, B, D)  this GPU's
    keys: torch.Tensor          # (V, N, D)  all GPUs'


def has_other_ranks():
    return dist.is_initialized() and dist.get_world_size() > 1


def gather(*vectors):
    """Several tensors (V, B, D) -> a Gathered for each; one collective serves them all."""
    if not has_other_ranks():
        return [Gathered(x, x) for x in vectors]
    all_keys = AllGather.apply(torch.cat(vectors)).split([len(x) for x in vectors])
    return [Gathered(x, keys) for x, keys in zip(vectors, all_keys)]


class AllGather(torch.autograd.Function):
    """(V, B, D) on every rank -> (V, N, D) on all of them; each gradient goes back to the rank that its vector came
    from. B is equal on all ranks.

    ours: the gradient is exact. Each rank's loss is a mean over its B queries, and its backward pass gives a gradient
    to all N keys, also to those of other ranks. all_reduce sums these gradients over the ranks, and DDP divides by
    their number: the gradient of the mean over all N queries. The released code's gradient is smaller, see
    docs/differences.md.
    """

    @staticmethod
    def forward(ctx, x):
        V, B, D = x.shape
        ctx.B = B
        world = dist.get_world_size()
        gathered = x.new_empty(world * V, B, D)
        # In torch versions without all_gather_single the same collective is called all_gather_into_tensor.
        all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor
        all_gather(gathered, x.contiguous())
        return gathered.view(world, V, B, D).transpose(0, 1).flatten(1, 2)      # (V, world * B = N, D)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()            # all_reduce writes into it
        dist.all_reduce(grad)
        return grad.narrow(1, dist.get_rank() * ctx.B, ctx.B)


# --- 6. The two towers (CLIP) ----------------------------------------------------------------------------------------

class Tower(nn.Module):
    """What both towers do with their views.

    A tower has `embed`, `transformer`, `norm` and `proj`. `embed` takes n images or captions of one size. It returns
    their sequences (n, R, W), and `row` (n,): which row of each becomes the vector, the class token's or the end
    token's. If only the vectors are wanted, the last block computes this row alone: the same vector, with fewer
    multiplications. In part 7 take `row` as None on a first reading: then every row is computed.
    """

    def forward(self, views):
        """views: list of V (B, ...) -> list of V [cls] or [eot] (B, D). Neighbours of one size share a pass, so views
        of sizes 224, 96, 96 and 96 take two (COSMOS.encode calls view 0 alone)."""
        vectors = []
        for _, neighbours in groupby(views, key=lambda view: view.shape):
            same_size = list(neighbours)
            sequences, row = self.embed(torch.cat(same_size))
            picked = self.norm(self.transformer(sequences, row)[:, 0])  # (n, 1, W) -> (n, W)
            vectors += (picked @ self.proj).chunk(len(same_size))
        return vectors

    def with_sequence(self, view):
        """One view (B, ...) -> [cls] or [eot] (B, D), and all rows of its sequence after `norm` (B, R, W)."""
        embedded, row = self.embed(view)
        sequence = self.norm(self.transformer(embedded))
        return pick(sequence, row)[:, 0] @ self.proj, sequence


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

    def embed(self, images):
        """images (n, 3, height, width) -> sequences (n, 1 + P, W), with positions, and the row (n,) of the class token,
        which is 0."""
        n, _, height, width = images.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f'an image of {height} x {width} pixels cannot be cut into patches of {p}; '
                             f'resize or pad it to multiples of {p}')
        patches = self.conv1(images).flatten(2).mT                      # (n, P, W)
        cls = self.class_embedding.expand(n, 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.positions(height // p, width // p)
        class_row = torch.zeros(n, dtype=torch.long, device=x.device)
        return self.ln_pre(x), class_row

    def positions(self, h, w):
        """Position embeddings for an h x w grid of patches, (1 + h*w, W): the learned ones if that is the training
        grid, otherwise interpolated between them (bicubic)."""
        grid = self.grid
        if h == w == grid:
            return self.positional_embedding
        of_cls, of_patches = self.positional_embedding.split([1, grid ** 2])
        learned = of_patches.T.unflatten(1, (grid, grid))[None]         # (1, W, grid, grid)
        # paper silent (transformer.py:646-669): like DINO, the released code adds 0.1, so that rounding never loses a
        # row of the grid. This also stretches the grid a little. The released weights were trained with the 0.1, so it
        # must stay.
        zoom = (h + 0.1) / grid, (w + 0.1) / grid
        zoomed = F.interpolate(learned, scale_factor=zoom, mode='bicubic')  # (1, W, h, w)
        return torch.cat([of_cls, zoomed[0].flatten(1).T])


class TextTower(Tower):
    """Causal transformer. The end-of-text token is the first to see the whole caption, so its vector stands for it.

    If only [eot] is wanted, B texts may be cut where the longest one ends, because an end token never sees the padding
    after it. A text that is cut before its end gives a wrong [eot] without any error.
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

    def embed(self, ids):
        """ids (n, T) -> sequences (n, T, W), with positions added, and the end token's row (n,)."""
        T = ids.shape[1]
        return self.token_embedding(ids) + self.positional_embedding[:T], end_of(ids)


def end_of(ids):
    """ids (..., T) -> where each text ends (...): at the end-of-text token, which has the largest id."""
    return ids.argmax(dim=-1)


# --- 7. Transformer: stack, block, attention (CLIP) ------------------------------------------------------------------

class Transformer(nn.Module):
    """A stack of blocks. If causal, each row attends to itself and the rows before it, otherwise to every row."""

    def __init__(self, width, layers, heads, quick_gelu, causal=False):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, quick_gelu, causal) for _ in range(layers))

    def forward(self, x, row=None):
        """x (n, R, W) -> (n, R, W). With `row` (n,) only that row of each sequence, (n, 1, W). Blocks before the last
        compute every row, because the next one reads them all."""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x)
        return last(x, row)


class QuickGELU(nn.Module):
    """An approximation of GELU that OpenAI's CLIP uses. Confusing the two raises no error, but lowers the scores."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(LN x), then x + MLP(LN x). GELU is exact, as in the released models,
    unless `quick_gelu` is set."""

    def __init__(self, width, heads, quick_gelu, causal):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, row=None):
        """x (n, R, W) -> (n, R, W). With `row` (n,) only that row is a query: (n, 1, W)."""
        normed = self.ln_1(x)                                           # (n, R, W)
        if row is None:
            x = x + self.attn(normed, normed)
        else:
            x = pick(x, row) + self.attn(pick(normed, row), normed, row)
        return x + self.mlp(self.ln_2(x))


def pick(x, row):
    """One row of each sequence: x (n, R, W), row (n,) -> (n, 1, W)."""
    return x.gather(1, row[:, None, None].expand(-1, 1, x.shape[2]))


class Attention(nn.MultiheadAttention):
    """torch's multi-head attention, whose names all checkpoints use, with its own forward pass, because we need q, k
    and v themselves: for the weights that the pictures show, and for segmentation in eval.py.

    in_proj_weight (3 W, W) stacks the matrices of query, key and value, and in_proj_bias (3 W) stacks their biases.
    """

    def __init__(self, width, heads, causal=False):
        super().__init__(width, heads)
        self.causal = causal

    def forward(self, query, context, row=None):
        """query (n, Q, W) reads context (n, R, W) -> (n, Q, W). In cross-attention W is D, and Q views ask.

        If causal, a query sees the rows of the context up to its own, which is `row` (n,) if that is given.
        """
        q, k, v = self.project(query, context)
        if q.device.type in ('cpu', 'mps'):
            # On a CPU plain products are 2 to 7 times as fast as the kernels below in bf16, though slower in float32
            # (docs/measurements.md). On mps is_causal may let a row see later ones in half precision (pytorch#195910).
            x = attention_weights(q, k, self.mask(context, row)) @ v
        elif self.causal and row is None:       # the flash kernel takes no mask, but knows the causal one
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(context, row))
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def mask(self, context, row):
        """-> True where a query may look, (R, R), or with `row` (n, 1, 1, R). None: everywhere."""
        if not self.causal:
            return None
        rows = torch.arange(context.shape[1], device=context.device)        # (R,)
        if row is None:
            return rows <= rows[:, None]
        return rows <= row[:, None, None, None]

    def project(self, query, context):
        """query (n, Q, W), context (n, R, W) -> q (n, H, Q, d), k and v (n, H, R, d)."""
        W = query.shape[-1]
        weight_q, weight_kv = self.in_proj_weight.split([W, 2 * W])
        bias_q, bias_kv = self.in_proj_bias.split([W, 2 * W])
        q = F.linear(query, weight_q, bias_q)
        k, v = F.linear(context, weight_kv, bias_kv).chunk(2, dim=-1)
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]


def attention_weights(q, k, mask=None):
    """softmax(q k^T / sqrt(d)): q (..., Q, d), k (..., R, d) -> (..., Q, R). mask: True for the keys that a query may
    see; None: all."""
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.transpose(-2, -1)                                    # (..., Q, R)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)
