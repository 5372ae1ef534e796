"""Feature suppression: what does a checkpoint know of the small things?

    python -m lesson.suppression CKPT --shards runs/scenes [--only conflict] [--json figures.json]
    python -m lesson.suppression CKPT --karpathy dataset_flickr8k.json --images DIR

CKPT is any checkpoint that eval.load reads. --shards is a folder that holds val/, or is a val/. If its scenes list no
objects, only `conflict` is measured. A model without cross-attention has only `objects`. The groups of figures:

objects: what the vector of a whole image tells. `top1`, of the dominant and of the small objects, says how many are
named: take the object's own name, and the names of its colour with five shapes that the scene lacks. From each name's
cosine with this image subtract its mean over all held-out scenes, so that no name wins by being popular. Is the
object's own name now the highest? A tie is a miss; chance is 16.7 %. And `retrieval` among the held-out scenes.

pointing: where in the image does the highest weight of C^I lie? We ask "there is a NAME", with an object's own name: is
the peak on the object (`own_it`), on another one (`own_other`), or on the ground? For `color`, in scenes of both
colours, we ask for an absent name of each: is the peak on an object of that colour (`asked`), or of the other?

handed: what does C^I hand over? We ask it for one name, and take its answer alone, without adding the question.
`cosine`: how alike are two answers about one scene, to two different names (`names`)? And two answers to one name,
about two different scenes (`scenes`)?

conflict: give C^I the sentence of one pair and the image of another. Which of 32 images, as the teacher sees them, does
h_T pick? See section 5.

minor, with --karpathy: photographs with several captions. A noun is minor in a photograph if one caption mentions it,
and dominant if four or more do. See section 6.
"""
import re
from collections import Counter, defaultdict
from itertools import islice
from math import log
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from cosmos import Output, clip_loss, cosmos_terms, unit
from eval import (Images, class_vectors, embed_images, execute, load, progress, shard_captions,
                  shard_image, zero_shot_retrieval)
from lesson.scenes import ABSENT, FORMS, NAMES, mask_of
from plumbing.captions import sentences
from plumbing.errors import command, need
from plumbing.files import read_json
from plumbing.lists import karpathy_rows
from plumbing.options import Parser, add_checkpoint
from plumbing.shards import Shards

# --- 1. Scenes and their objects -------------------------------------------------------------------------------------

def lists_objects(record):
    """Does the json of a pair list objects as those of this version of lesson.scenes do? Other sets may have anything
    under this key."""
    objects = record.get('objects')
    if not isinstance(objects, list) or not objects or not isinstance(objects[0], dict):
        return False
    return {'name', 'role', 'centre', 'absent'} <= set(objects[0])


def read_scenes(shards):
    """-> [[object, ...], ...], a list for each scene; [] if the first pair of a set does not list objects.

    The attributes of an object are what its json lists, its color and shape, its pair, and its number in the mask.
    """
    scenes = []
    if not lists_objects(shards.record(0)):
        return scenes
    for pair in range(len(shards)):
        scene = []
        for number, listed in enumerate(shards.record(pair)['objects'], 1):
            color, shape = listed['name'].split()
            more = {'color': color, 'shape': shape, 'pair': pair, 'number': number}
            scene.append(SimpleNamespace(**listed, **more))
        scenes.append(scene)
    return scenes


# --- 2. Named --------------------------------------------------------------------------------------------------------

COLUMN = {name: k for k, name in enumerate(NAMES)}      # of a table of scores (n images, K names)
TIE = 1e-6                                              # a smaller difference is one of rounding


def name_scores(model, tokenizer, image_features):
    """Cosines of image features (n, D) with all names, in the words of the captions, (n, K)."""
    return image_features @ class_vectors(model, tokenizer, NAMES, FORMS).T


def share(flags):
    """The share of a bool tensor that is true."""
    return flags.double().mean().item()


def named(scores, scenes):
    """-> {role: {top1, chance, objects (how many)}}. scores: of all scenes of the set, because their means are
    subtracted."""
    raised = scores - scores.mean(dim=0)
    hits = defaultdict(list)
    for thing in sum(scenes, []):
        row = raised[thing.pair]
        wrong = row[[COLUMN[name] for name in thing.absent]]            # (ABSENT,)
        lead = row[COLUMN[thing.name]] - wrong.max()
        hits[thing.role].append(bool(lead > TIE))
    figures = {}
    for role, found in hits.items():
        figures[role] = {'top1': fmean(found), 'chance': 1 / (1 + ABSENT), 'objects': len(found)}
    return figures


def objects(args, scored, shards, scenes):
    model, tokenizer, _ = scored
    ranking, image_features = zero_shot_retrieval(*scored, shards, workers=args.workers)
    return named(name_scores(model, tokenizer, image_features), scenes) | {'retrieval': ranking}


# --- 3. Where C^I looks ----------------------------------------------------------------------------------------------

def question(name):
    return FORMS[0].format(name)                        # 'there is a red star'


def objects_at(scene, config):
    """The number of the object in the middle of each patch, 0 for the ground, (P,)."""
    size = config.image_size
    mask = Image.fromarray(mask_of(scene)).resize((size, size), Image.NEAREST)
    p = config.patch_size
    return pil_to_tensor(mask)[0, p // 2::p, p // 2::p].flatten()


@torch.no_grad()
def pointing(args, scored, shards, scenes):
    """-> {role: {own_it, own_other}, color: {asked, other}}, shares; see the head of this file. Each of the two colours
    of a scene is asked for once, so a model that looks at one place whatever is asked has equal shares of `asked` and
    `other`."""
    model, tokenizer, preprocess = scored
    device = model.logit_scale.device
    questions = tokenizer(list(map(question, NAMES)))
    eot, _ = model.encode_text(questions.to(device))                    # (K, D)
    found = defaultdict(lambda: defaultdict(list))                      # by role and figure
    for pair, scene in enumerate(progress(scenes, 'maps')):
        image = preprocess(shard_image(shards, pair))
        _, patches = model.encode_image(image[None].to(device))         # (1, P, D)
        numbers = objects_at(scene, model.config)                       # (P,)
        peaks = {}                      # {colour of an absent name: number of the object at the peak}
        for thing in scene:
            asked = [COLUMN[thing.name], COLUMN[thing.absent[0]]]
            weights = model.image_cross.weights(eot[asked], patches.expand(2, -1, -1))
            own, absent = numbers[weights.argmax(dim=1).cpu()].tolist()
            found[thing.role]['own_it'].append(own == thing.number)
            found[thing.role]['own_other'].append(own not in (thing.number, 0))
            peaks[thing.color] = absent
        if len(peaks) > 1:
            color_of = {thing.number: thing.color for thing in scene}
            for asked_color, number in peaks.items():
                there = color_of.get(number)                # None: the ground
                found['color']['asked'].append(there == asked_color)
                found['color']['other'].append(there not in (asked_color, None))
    figures = {}
    for role, columns in found.items():
        figures[role] = {name: fmean(values) for name, values in columns.items()}
    return {'pointing': figures}


# --- 4. What C^I hands over ------------------------------------------------------------------------------------------

def mean_cosine(vectors):
    """vectors (..., k, D) of unit length -> the mean cosine of two different ones of the k."""
    k = vectors.shape[-2]
    # |a_1 + ... + a_k|² = k + the sum of the cosines of all ordered pairs, because every vector has unit length.
    squares = vectors.sum(dim=-2).square().sum(dim=-1)
    return ((squares - k) / (k * (k - 1))).mean().item()


@torch.no_grad()
def handed(args, scored, shards, scenes):
    """-> {cosine: {names, scenes}}; see the head of this file."""
    model, tokenizer, preprocess = scored
    device = model.logit_scale.device
    patches = []
    for pixels in DataLoader(Images(shards, preprocess), 100):
        patches.append(model.encode_image(pixels.to(device))[1])
    patches = torch.cat(patches)                                        # (n, P, D)
    questions = tokenizer(list(map(question, NAMES)))
    queries, _ = model.encode_text(questions.to(device))                # (K, D)
    answers = []
    for query in queries:
        answer = model.image_cross(query.expand(1, len(patches), -1), patches)      # (1, n, D)
        answers.append(unit(answer[0]))
    of_scenes = torch.stack(answers, dim=1)                             # (n, K, D)
    of_names = of_scenes.transpose(0, 1)
    return {'handed': {'cosine': {'names': mean_cosine(of_scenes), 'scenes': mean_cosine(of_names)}}}


# --- 5. Conflict: the sentence of one pair, the image of another -----------------------------------------------------

# In groups of 32 pairs, the student's h_T must pick among the teacher's cls_t of the 32 images. For h_I the roles are
# swapped: its queries are images, it reads captions, and it picks among the teacher's eot_t of these captions.
#
#     own         it reads its own image: does it pick that image?
#     sentence    it reads its neighbour's image: does it pick the image of its sentence (h_I: the image's caption),
#     read        or the one that it has read?
#     alone       it reads nothing, so eot (h_I: cls) must pick: the most that `sentence` can be expected to reach
#
# No figure means much by itself. A model that only copies what it reads reaches 100 % at `own` and `read`, and 0 at
# `sentence`, whatever it knows about sentences. A model that hardly uses what it reads has `own` and `sentence` equal
# to `alone`, and `read` nearly 0. With fewer than 32 pairs the groups are smaller, and chance is higher.

GROUP = 32
GROUPS = 30             # at most; they have 960 pairs


def picks(vectors, candidates, right):
    """The share of vectors (B, D) that are nearest to candidate right (B,) of (B, D); a tie is a miss."""
    cosines = vectors @ candidates.T                                    # (B, B)
    wanted = right[:, None]
    others = cosines.scatter(1, wanted, -torch.inf)
    lead = cosines.gather(1, wanted)[:, 0] - others.amax(dim=1)
    return share(lead > TIE)


def picked(queries, tokens, cross, candidates):
    """What a group of pairs picks -> {own, sentence, read, alone}.

    queries (B, D): the sentences, not of unit length. tokens (B, R, D): what cross (C^I) reads of the images.
    candidates (B, D): the teacher's images, of unit length.
    """
    places = torch.arange(len(queries), device=queries.device)
    neighbours = places.roll(1)
    h = unit(cross(queries[None], tokens)[0] + queries)                 # Eq. 2
    h_other = unit(cross(queries[None], tokens[neighbours])[0] + queries)
    return {
        'own': picks(h, candidates, places),
        'sentence': picks(h_other, candidates, places),
        'read': picks(h_other, candidates, neighbours),
        'alone': picks(unit(queries), candidates, places)}


@torch.no_grad()
def answers_of(student, teacher, pixels, question_ids, caption_ids):
    """A group of pairs -> {h_T, h_T_caption, h_I: {own, sentence, read, alone}}. ids (B, T) keep their padding, because
    C^T has learnt to read it."""
    device = student.logit_scale.device
    pixels = pixels.to(device)
    caption_ids = caption_ids.to(device)
    cls, patches = student.encode_image(pixels)
    question_eot, _ = student.encode_text(question_ids.to(device))
    caption_eot, words = student.encode_text(caption_ids)
    cls_t = unit(teacher.encode_image(pixels)[0])
    eot_t = unit(teacher.encode_text(caption_ids)[0])
    return {
        'h_T': picked(question_eot, patches, student.image_cross, cls_t),
        'h_T_caption': picked(caption_eot, patches, student.image_cross, cls_t),
        'h_I': picked(cls, words, student.text_cross, eot_t)}


def conflict(args, scored, shards, scenes):
    """-> {h_T, h_T_caption, h_I: {own, sentence, read, alone}}, shares of the pairs.

    The student of args.checkpoint reads, whatever --weights says, and its teacher gives the targets; if the file holds
    one network, it does both. h_T_caption and h_I have the first caption of each image. The sentence of h_T names an
    object of the scene, each in turn from scene to scene. In other sets it is the caption's first sentence.
    """
    student, tokenizer, preprocess = load(args.checkpoint, 'student', args.vocab)
    teacher, *_ = load(args.checkpoint, 'teacher', args.vocab)
    student.to(args.device)
    teacher.to(args.device)
    firsts = {}                                         # {image: its first caption}
    for caption, image in zip(*shard_captions(shards)):
        firsts.setdefault(int(image), caption)
    captions = list(firsts.values())
    if scenes:
        questions = [question(scene[pair % len(scene)].name) for pair, scene in enumerate(scenes)]
    else:
        questions = [(sentences(caption) or [caption])[0] for caption in captions]
    size = min(GROUP, len(captions))
    need(size > 1, 'there is one pair; conflict needs two or more')
    found = []                                          # of each group
    groups = DataLoader(Images(shards, preprocess), size, num_workers=args.workers, drop_last=True)
    for number, pixels in enumerate(islice(progress(groups, 'conflict'), GROUPS)):
        group = slice(number * size, (number + 1) * size)
        ids = tokenizer(questions[group]), tokenizer(captions[group])
        found.append(answers_of(student, teacher, pixels, *ids))
    figures = {}
    for who, answered in found[0].items():
        figures[who] = {name: fmean(group[who][name] for group in found) for name in answered}
    return {'conflict': figures}


# --- Cut: what each loss costs if one modality is cut away -----------------------------------------------------------

def mean_of_batch(x):
    """(B, ...) -> the same shape; every pair has the mean of the batch, so nothing tells one pair from another."""
    return x.mean(dim=0, keepdim=True).expand_as(x)


def losses_of(student, cls, eot, patches, words, cls_t, eot_t):
    """One batch of the student's vectors and tokens, and the teacher's vectors -> {loss: share of guessing, ln B}."""
    h_I = student.text_cross(cls[None], words)[0] + cls                 # Eq. 1
    h_T = student.image_cross(eot[None], patches)[0] + eot              # Eq. 2
    out = Output(*[unit(x)[None] for x in (cls, eot, h_I, h_T)])
    losses = {'L_CLIP': clip_loss(out, student.logit_scale.exp())}
    losses |= cosmos_terms(out, cls_t[None], eot_t[None], student.distill_logit_scale.exp())
    return {name: loss.item() / log(len(cls)) for name, loss in losses.items()}


@torch.no_grad()
def cut(args, scored, shards, scenes):
    """-> {L_CLIP and the four terms of Eq. 6: {all, text_cut, image_cut}}, each loss as a share of ln 32, over batches
    of 32 pairs, one view and the first caption of each.

    A cut replaces eot and words, or cls and patches, by their mean over the batch, before cross-attention. The student
    is cut; the teacher's targets are whole.
    """
    student, tokenizer, preprocess = load(args.checkpoint, 'student', args.vocab)
    teacher, *_ = load(args.checkpoint, 'teacher', args.vocab)
    student.to(args.device)
    teacher.to(args.device)
    firsts = {}                                         # {image: its first caption}
    for caption, image in zip(*shard_captions(shards)):
        firsts.setdefault(int(image), caption)
    captions = list(firsts.values())
    size = min(GROUP, len(captions))
    found = []                                          # of each batch
    groups = DataLoader(Images(shards, preprocess), size, num_workers=args.workers, drop_last=True)
    for number, pixels in enumerate(progress(groups, 'cut')):
        ids = tokenizer(captions[number * size:(number + 1) * size]).to(args.device)
        cls, patches = student.encode_image(pixels.to(args.device))
        eot, words = student.encode_text(ids)
        cls_t = unit(teacher.encode_image(pixels.to(args.device))[0])
        eot_t = unit(teacher.encode_text(ids)[0])
        cuts = {
            'all': (cls, eot, patches, words),
            'text_cut': (cls, mean_of_batch(eot), patches, mean_of_batch(words)),
            'image_cut': (mean_of_batch(cls), eot, mean_of_batch(patches), words)}
        found.append({name: losses_of(student, *vectors, cls_t, eot_t) for name, vectors in cuts.items()})
    figures = {}
    for loss in found[0]['all']:
        figures[loss] = {name: fmean(batch[name][loss] for batch in found) for name in cuts}
    return {'cut': figures}


# --- 6. Minor: what one of a photograph's captions mentions ----------------------------------------------------------

# For each noun the test photographs are ranked by their cosine with a few prompts. One that mentions the noun should
# rank above one that never does. But the scene gives most nouns away: who knows only what at least three of a
# photograph's captions say (its context) ranks well without seeing the noun. So photographs are matched. A naive Bayes
# model, learnt from the training captions, says how strongly a context suggests the noun, whose own forms are left out;
# and a photograph is compared only with the 20 whose contexts suggest it most nearly as strongly.
#
#     auc         the share of these 20 that rank below the photograph (a tie counts half), averaged over the
#                 photographs of a noun, and then over the nouns with at least 12 such photographs
#
# On the test photographs of Flickr8k the context itself still reaches .543 at minor and .583 at dominant, and who knows
# what at least two captions say, but not the noun itself, .694 and .752. So a high figure alone does not prove that the
# small thing was seen. Compare models that trained on the same photographs.

# fixed before any figure
NOUNS = """
    dog ball water beach grass snow bike bicycle car hat shirt tree wall street mountain rock field
    sand fence bench stick pool boat helmet jacket pants shorts dress coat glasses sunglasses hill
    river lake ocean wave sky building house road sidewalk crowd tent toy rope horse bird soccer
    football basketball frisbee skateboard surfboard motorcycle bag backpack chair table food drink
    camera phone guitar flag umbrella swing slide collar mouth tongue hand face hair arm leg head
    log bridge sign truck train bus ramp trail path forest wood bush leaf flower park playground
    yard stairs step rail window door bed couch floor ice cliff child boy girl man woman baby person
    """.split()
PROMPTS = 'a {}', 'there is a {}', 'a photo of a {}'
# how many captions of the photograph mention the noun
KINDS = {'minor': range(1, 2), 'dominant': range(4, 100)}
FEWEST = 12                             # such photographs that a noun must have
NEAREST = 20                            # photographs without the noun, for each with it
KNOWN = 3                               # what so many captions say is the context


def forms_of(noun):
    """The singular and the plural of a noun."""
    forms = {noun, f'{noun}s', f'{noun}es'}
    if noun == 'child':
        forms.add('children')
    if noun == 'person':
        forms.add('people')
    for singular, plural in ('y', 'ies'), ('f', 'ves'), ('man', 'men'):
        if noun.endswith(singular):
            forms.add(noun.removesuffix(singular) + plural)
    return forms


def mentions(photograph, forms):
    """How many captions mention a noun. photograph: the set of words of each caption."""
    return sum(not forms.isdisjoint(words) for words in photograph)


def context_of(photograph):
    """The words that at least KNOWN captions of a photograph have."""
    counts = Counter(word for words in photograph for word in words)
    return {word for word, count in counts.items() if count >= KNOWN}


def log_odds(contexts, has_noun):
    """Naive Bayes -> {word: how much more likely it is in the context of a photograph that mentions the noun than in
    that of another, as a logarithm}. has_noun: a bool for each context."""
    counts = {True: Counter(), False: Counter()}
    for context, has in zip(contexts, has_noun):
        counts[has].update(context)
    photographs = Counter(has_noun)
    odds = {}
    for word in counts[True] | counts[False]:
        with_noun = (counts[True][word] + 1) / (photographs[True] + 2)  # smoothed, so it is never 0
        without = (counts[False][word] + 1) / (photographs[False] + 2)
        odds[word] = log(with_noun) - log(without)
    return odds


def share_below(scores, positive, negatives):
    """The share of negatives that score below the positive; a tie counts half."""
    gaps = scores[positive] - scores[negatives]
    return share(gaps > 0) + share(gaps == 0) / 2


def matched(scores, suggested, said, counts):
    """-> share_below, averaged over the photographs that mention a noun so many times; None for fewer than FEWEST.
    suggested, said (n,): how strongly each context suggests the noun, and how many captions mention it."""
    positives = [place for place, count in enumerate(said) if count in counts]
    if len(positives) < FEWEST:
        return None
    without = torch.tensor([place for place, count in enumerate(said) if count == 0])
    shares = []
    for positive in positives:
        gaps = (suggested[without] - suggested[positive]).abs()
        nearest = without[gaps.argsort(stable=True)[:NEAREST]]
        shares.append(share_below(scores, positive, nearest))
    return fmean(shares)


def minor(cosines, photographs):
    """-> {minor, dominant: {auc, nouns (how many)}}. cosines (n, nouns): of the test photographs and the
    nouns. photographs: {'train', 'test': for each photograph the sets of words of its captions}."""
    contexts = {split: list(map(context_of, each)) for split, each in photographs.items()}
    found = defaultdict(list)
    for scores, noun in zip(cosines.T, NOUNS, strict=True):
        forms = forms_of(noun)
        has_noun = [mentions(photograph, forms) > 0 for photograph in photographs['train']]
        odds = log_odds([context - forms for context in contexts['train']], has_noun)
        suggested = []
        for context in contexts['test']:
            words = sorted(context - forms)             # because the last bits depend on the order
            suggested.append(sum(odds.get(word, 0.0) for word in words))
        said = [mentions(photograph, forms) for photograph in photographs['test']]
        for kind, counts in KINDS.items():
            auc = matched(scores, torch.tensor(suggested, dtype=torch.double), said, counts)
            if auc is not None:
                found[kind].append(auc)
    figures = {}
    for kind in KINDS:
        need(found[kind], f'no noun of lesson.suppression is {kind} in {FEWEST} test photographs or more')
        figures[kind] = {'auc': fmean(found[kind]), 'nouns': len(found[kind])}
    return figures


def measure_minor(args, model, tokenizer, preprocess):
    photographs = {'train': [], 'test': []}
    paths = []
    for split, name, captions in karpathy_rows(read_json(args.karpathy)):
        if split in photographs:
            words = [set(re.findall('[a-z]+', caption.lower())) for caption in captions]
            photographs[split].append(words)
        if split == 'test':
            paths.append(Path(args.images or Path(args.karpathy).parent, name))
    image_features = embed_images(model, paths, preprocess, args.workers)
    vectors = class_vectors(model, tokenizer, NOUNS, PROMPTS)
    cosines = image_features.double() @ vectors.double().T              # (n, nouns)
    return {'minor': minor(cosines, photographs)}


# --- 7. During training, and the command -----------------------------------------------------------------------------

def scene_figures(model, tokenizer, image_features, shards):
    """The figures of held-out scenes, which train.py writes to eval.json; {} if the set lists no objects."""
    scenes = read_scenes(shards)
    if not scenes:
        return {}
    return named(name_scores(model, tokenizer, image_features), scenes)


class Named:
    """A watcher that tells train.main the figures of held-out scenes."""

    def begin(self, run):
        """Nothing to prepare."""

    def evaluated(self, run, val, image_features):
        return scene_figures(run.model, run.train_set.tokenizer, image_features, val)

    def finish(self, run):
        """Nothing to write."""


MEASURES = {'objects': objects, 'pointing': pointing, 'handed': handed, 'conflict': conflict, 'cut': cut}


def measure(args, *scored):
    """The figures that args.only names, or all that this model and this set have."""
    if args.karpathy:
        need(args.only in (None, 'minor'), f'--only {args.only} needs --shards; --karpathy is for minor')
        return measure_minor(args, *scored)
    shards = Shards(args.shards, split='val')
    scenes = read_scenes(shards)
    possible = list(MEASURES)
    if not scored[0].has_cross_attention:
        possible = ['objects']
    if not scenes:
        possible = [name for name in possible if name in ('conflict', 'cut')]
    wanted = [args.only] if args.only else possible
    need(wanted and set(wanted) <= set(possible),
         f'with {args.checkpoint} and {args.shards} one can measure {possible}; the rest needs cross-attention, a set '
         'drawn by python -m lesson.scenes or, for minor, --karpathy')
    figures = {}
    for name in wanted:
        print(f'measuring  {name}')
        figures |= MEASURES[name](args, scored, shards, scenes)
    return figures


def main():
    parser = Parser(prog='python -m lesson.suppression', epilog=__doc__)
    add_checkpoint(parser)
    parser.set_defaults(command='suppression', function=measure)
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source('--shards', help='held-out scenes, as runs/scenes or its val/; conflict takes any held-out shards')
    source('--karpathy', help="Karpathy's list, such as dataset_flickr8k.json: measures minor")
    add = parser.add_argument
    add('--images', help='folder of the photographs of --karpathy (default: the folder of the list)')
    add('--only', choices=[*MEASURES, 'minor'], help='one group of figures, instead of all')
    execute(parser.parse_args())


if __name__ == '__main__':
    command(main)
