"""Feature suppression: what does a checkpoint know of the small things?

    python -m lesson.suppression CKPT --shards runs/scenes [--only conflict] [--json figures.json]

CKPT is any checkpoint that eval.load reads. --shards is a folder that holds val/, or is a val/. If its scenes list no
objects, only `conflict` and `cut` are measured. A model without cross-attention has only `named`. The groups are:

named: what the vector of a whole image tells. `top1`, of the dominant and of the small objects, says how many are
named: take the object's own name, and the names of its colour with five shapes that the scene lacks. From each name's
cosine with this image subtract its mean over all held-out scenes, so that no name wins by being popular. Is the
object's own name now the highest? A tie is a miss; chance is 16.7 %. And `retrieval` among the held-out scenes.

pointing: where in the image does the highest weight of C^I lie? We ask "there is a NAME", with an object's own name: is
the peak on this object (`own_it`)? For `color`, in scenes of both colours, we ask for an absent name of each: is the
peak on an object of that colour (`asked`), or of the other?

conflict (section 5): give C^I the caption of one pair and the image of another. Which of 32 images, as the teacher sees
them, does h_T pick?

cut (section 6): which of the losses need both the image and the text?
"""
from collections import defaultdict
from itertools import islice
from math import log
from statistics import fmean

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from cosmos import GLOBALS, Output, clip_loss, cosmos_terms, unit
from data import Counts, Order, TrainingSet, loader
from eval import (TIE, Images, class_vectors, execute, load, progress_bar, shard_captions, shard_image,
                  target_ranks, zero_shot_retrieval)
from lesson.scenes import ABSENT, FORMS, NAMES, mask_of, read_things
from plumbing.errors import command, need
from plumbing.options import Parser, add_checkpoint
from plumbing.processes import loading
from plumbing.runs import Watcher
from plumbing.shards import Shards

# --- 1. Scenes and their objects -------------------------------------------------------------------------------------

def read_scenes(shards):
    """-> [[Thing, ...], ...], the objects of each scene; [] if a pair of the set lists none."""
    scenes = []
    for pair in range(len(shards)):
        things = read_things(shards.record(pair))
        if not things:
            return []
        scenes.append(things)
    return scenes


def means_of(found):
    """{group: {figure: list of values}} -> {group: {figure: their mean}}"""
    figures = {}
    for group, columns in found.items():
        figures[group] = {name: fmean(values) for name, values in columns.items()}
    return figures


# --- 2. Named --------------------------------------------------------------------------------------------------------

COLUMN = {name: k for k, name in enumerate(NAMES)}      # of a table of scores (n images, K names)


def name_scores(model, tokenizer, image_features):
    """Cosines of image features (n, D) with all names, in the words of the captions, (n, K)."""
    return image_features @ class_vectors(model, tokenizer, NAMES, FORMS).T


def named(scores, scenes):
    """-> {role: {top1, chance, objects (how many)}}. scores: of all scenes of the set, because their means are
    subtracted."""
    raised = scores - scores.mean(dim=0)
    hits = defaultdict(list)
    for row, scene in zip(raised, scenes):
        for thing in scene:
            wrong = row[[COLUMN[name] for name in thing.absent]]        # (ABSENT,)
            lead = row[COLUMN[thing.name]] - wrong.max()
            hits[thing.role].append(bool(lead > TIE))
    figures = {}
    for role, found in hits.items():
        figures[role] = {'top1': fmean(found), 'chance': 1 / (1 + ABSENT), 'objects': len(found)}
    return figures


def measure_named(args, scored, shards, scenes):
    model, tokenizer, _ = scored
    ranking, image_features = zero_shot_retrieval(*scored, shards, workers=args.workers)
    return named(name_scores(model, tokenizer, image_features), scenes) | {'retrieval': ranking}


# --- 3. Where C^I looks ----------------------------------------------------------------------------------------------

def objects_at(scene, config):
    """The number of the object in the middle of each patch, 0 for the ground, (P,)."""
    size = config.image_size
    mask = Image.fromarray(mask_of(scene)).resize((size, size), Image.NEAREST)
    p = config.patch_size
    return pil_to_tensor(mask)[0, p // 2::p, p // 2::p].flatten()


@torch.no_grad()
def pointing(args, scored, shards, scenes):
    """-> {role: {own_it}, color: {asked, other}}, shares; see the head of this file. Each of the two colours
    of a scene is asked for once, so a model that looks at one place whatever is asked has equal shares of `asked` and
    `other`."""
    model, tokenizer, preprocess = scored
    device = model.logit_scale.device
    questions = tokenizer([FORMS[0].format(name) for name in NAMES])            # 'there is a red star'
    eot, _ = model.encode_text(questions.to(device))                    # (K, D)
    found = defaultdict(lambda: defaultdict(list))                      # by role and figure
    for pair, scene in enumerate(progress_bar(scenes, 'maps')):
        image = preprocess(shard_image(shards, pair))
        _, patches = model.encode_image(image[None].to(device))         # (1, P, D)
        numbers = objects_at(scene, model.config)                       # (P,)
        peaks = {}                      # {colour of an absent name: number of the object at the peak}
        for number, thing in enumerate(scene, 1):
            asked = [COLUMN[thing.name], COLUMN[thing.absent[0]]]
            weights = model.read_image.weights(eot[asked], patches.expand(2, -1, -1))
            own, absent = numbers[weights.argmax(dim=1).cpu()].tolist()
            found[thing.role]['own_it'].append(own == number)
            peaks[thing.color] = absent
        if len(peaks) > 1:
            color_at = [None, *(thing.color for thing in scene)]            # None: the ground
            for asked_color, peak in peaks.items():
                there = color_at[peak]
                found['color']['asked'].append(there == asked_color)
                found['color']['other'].append(there not in (asked_color, None))
    return {'pointing': means_of(found)}


# --- 4. Groups of pairs ----------------------------------------------------------------------------------------------

GROUP = 32


def both_networks(args, shards):
    """-> student, teacher, tokenizer, preprocess of args.checkpoint, whatever --weights says. If the file holds one
    network, it is both."""
    need(len(shards) > 1, 'there is one pair, and so no other to mistake it for; give two or more')
    student, tokenizer, preprocess = load(args.checkpoint, 'student', args.vocab, args.quick_gelu)
    teacher, *_ = load(args.checkpoint, 'teacher', args.vocab, args.quick_gelu)
    return student.to(args.device), teacher.to(args.device), tokenizer, preprocess


# --- 5. Conflict: the sentence of one pair, the image of another -----------------------------------------------------

# In groups of 32 pairs, the student's h_T must pick among the teacher's cls_t of the 32 images. Its sentence is the
# first caption of its image.
#
#     own         it reads its own image: does it pick that image?
#     sentence    it reads its neighbour's image: does it pick the image of its sentence,
#     read        or the one that it has read?
#     alone       it reads nothing, so eot must pick: the most that `sentence` can be expected to reach
#
# A model that only copies what it reads has 100 % at `own` and `read`, and 0 at `sentence`, whatever it knows about
# sentences. One that hardly uses what it reads has `own` and `sentence` equal to `alone`, and `read` nearly 0.

GROUPS = 30             # at most; they have 960 pairs


def picks(vectors, candidates, right):
    """The share of vectors (B, D) that are nearest to candidate right (B,) of (B, D); a tie is a miss."""
    places = torch.arange(len(candidates))
    found = target_ranks(vectors.cpu(), candidates.cpu(), right.cpu(), places)         # on the CPU: mps has no float64
    return (found == 1).double().mean().item()


def picked(eot, h_T, h_T_other, cls_t):
    """What a group of pairs picks -> {own, sentence, read, alone}. All (B, D): the sentences, once they have read their
    own image and once their neighbour's, of any length, and the teacher's images, of unit length."""
    places = torch.arange(len(eot), device=eot.device)
    return {
        'own': picks(unit(h_T), cls_t, places),
        'sentence': picks(unit(h_T_other), cls_t, places),
        'read': picks(unit(h_T_other), cls_t, places.roll(1)),
        'alone': picks(unit(eot), cls_t, places)}


@torch.no_grad()
def conflict(args, scored, shards, scenes):
    """-> {h_T_caption: {own, sentence, read, alone}}, shares of the pairs. The student reads, and the teacher gives the
    targets. A smaller set than GROUP is one group; a last, smaller group is dropped."""
    student, teacher, tokenizer, preprocess = both_networks(args, shards)
    firsts = {}                                         # {image: its first caption}
    for caption, image in zip(*shard_captions(shards)):
        firsts.setdefault(int(image), caption)
    captions = iter(firsts.values())
    size = min(GROUP, len(shards))
    images = DataLoader(Images(shards, preprocess), size, drop_last=True, **loading(args.workers))
    found = defaultdict(list)
    for pixels in islice(progress_bar(images, 'conflict'), GROUPS):             # (B, 3, s, s)
        ids = tokenizer([*islice(captions, size)])                              # (B, T)
        cls, eot, patches, words = student.encode([pixels.to(args.device)], [ids.to(args.device)])
        _, h_T = student.read(cls, eot, patches, words)
        _, h_T_other = student.read(cls, eot, patches.roll(1, 0), words)        # pair b reads the image of pair b - 1
        cls_t = unit(teacher.encode_image(pixels.to(args.device))[0])
        for name, value in picked(eot[0], h_T[0], h_T_other[0], cls_t).items():
            found[name].append(value)
    return {'conflict': means_of({'h_T_caption': found})}


# --- 6. Cut: which of the losses need both the image and the text? ---------------------------------------------------

# What does each loss cost if the student knows nothing of one modality? Before cross-attention eot and words, or cls
# and patches, are replaced by their mean over the batch, so they no longer tell one pair from another. The teacher's
# targets stay whole. A loss that stays low does without that modality. A cut is outside what the network was trained
# on, so a loss may also rise because of that. Crops are drawn as in training, without changes of colour.

LOCALS = 2              # local crops, and local captions, of a pair


def batches_of_crops(args, shards, tokenizer, config):
    """Yields images, texts and the teacher's texts of each batch of an epoch; a last, smaller batch is dropped."""
    counts = Counts(GLOBALS, LOCALS, GLOBALS, LOCALS)
    crops = TrainingSet(shards, tokenizer, config, seed=0, counts=counts, augment='crops')
    size = min(GROUP, len(shards))
    order = Order(len(shards), size, start=0, stop=len(shards) // size, seed=0)
    device = torch.device(args.device)
    batches = loader(crops, [*order], args.workers, device, multiple=8, whole_first=True)
    for batch in progress_bar(batches, 'cut'):
        batch = batch.to(device)
        yield batch.views(0, 0), batch.texts, batch.teacher_texts


def losses_of(student, cls, eot, patches, words, cls_t, eot_t):
    """The student's vectors (V, B, D) and (U, B, D) and tokens (B, R, D), unnormalised, and the teacher's vectors
    -> {loss: its share of ln B, which is what guessing costs}."""
    h_I, h_T = student.read(cls, eot, patches, words)
    out = Output(unit(cls), unit(eot), unit(h_I), unit(h_T))
    log_scale, distill_log_scale = student.log_scales()
    losses = {'L_CLIP': clip_loss(out, log_scale.exp())}
    losses |= cosmos_terms(out, cls_t, eot_t, distill_log_scale.exp())
    guess = log(len(patches))
    return {name: loss.item() / guess for name, loss in losses.items()}


@torch.no_grad()
def cut(args, scored, shards, scenes):
    """-> {L_CLIP and each term of Eq. 6: {all, text_cut, image_cut}}, shares of ln B."""
    student, teacher, tokenizer, _ = both_networks(args, shards)
    batches = batches_of_crops(args, shards, tokenizer, student.config)
    found = defaultdict(lambda: defaultdict(list))                      # by loss and by what is cut
    for images, texts, teacher_texts in batches:
        out_t = teacher(images[:GLOBALS], teacher_texts)
        cls, eot, patches, words = student.encode(images, texts)
        no_eot = eot.mean(dim=1, keepdim=True).expand_as(eot)
        no_words = words.mean(dim=0, keepdim=True).expand_as(words)
        no_cls = cls.mean(dim=1, keepdim=True).expand_as(cls)
        no_patches = patches.mean(dim=0, keepdim=True).expand_as(patches)
        cuts = {
            'all': (cls, eot, patches, words),
            'text_cut': (cls, no_eot, patches, no_words),
            'image_cut': (no_cls, eot, no_patches, words)}
        for name, seen in cuts.items():
            for loss, share in losses_of(student, *seen, out_t.cls, out_t.eot).items():
                found[loss][name].append(share)
    return {'cut': means_of(found)}


# --- 7. During training, and the command -----------------------------------------------------------------------------

def scene_figures(model, tokenizer, image_features, shards):
    """The figures of held-out scenes, which train.py writes to eval.json; {} if the set lists no objects."""
    scenes = read_scenes(shards)
    if not scenes:
        return {}
    return named(name_scores(model, tokenizer, image_features), scenes)


class Named(Watcher):
    """A watcher that tells train.main the figures of held-out scenes."""

    def evaluated(self, run, val, image_features):
        return scene_figures(run.model, run.train_set.tokenizer, image_features, val)


MEASURES = {'named': measure_named, 'pointing': pointing, 'conflict': conflict, 'cut': cut}
ANY_SET = 'conflict', 'cut'             # these need no objects


def measure(args, *scored):
    """The figures that args.only names, or all that this model and this set have."""
    shards = Shards(args.shards, split='val')
    scenes = read_scenes(shards)
    possible = list(MEASURES)
    if not scored[0].has_cross_attention:
        possible = ['named']
    if not scenes:
        possible = [name for name in ANY_SET if name in possible]
    wanted = [args.only] if args.only else possible
    need(wanted and set(wanted) <= set(possible),
         f'with {args.checkpoint} and {args.shards} one can measure {possible}; the rest needs cross-attention, or a '
         'set drawn by python -m lesson.scenes')
    figures = {}
    for name in wanted:
        print(f'measuring  {name}')
        figures |= MEASURES[name](args, scored, shards, scenes)
    return figures


def main():
    parser = Parser(prog='python -m lesson.suppression', epilog=__doc__)
    add_checkpoint(parser)
    parser.set_defaults(command='suppression', function=measure)
    add = parser.add_argument
    add('--shards', required=True,
        help='held-out scenes, as runs/scenes or its val/; for conflict and cut any held-out shards')
    add('--only', choices=MEASURES, help='one group of figures, instead of all')
    execute(parser.parse_args())


if __name__ == '__main__':
    command(main)
