"""Feature suppression, measured on scenes that list their objects: what does a checkpoint know of the small ones?

    python -m lesson.suppression CKPT --shards runs/scenes [--only conflict] [--json figures.json]

CKPT is any checkpoint that eval.load reads. There are four groups of figures, and --only takes one of them.

objects: what a vector of a whole image tells. For the dominant and for the small objects:

    top1        named: take the object's own name, and the names of its colour with five shapes that the scene lacks.
                From each name's cosine with this image subtract its mean over all held-out scenes, so that no name wins
                by being popular. Is the object's own name now the highest? A tie is a miss; chance 16.7 %

and for the whole set:

    bound       of two objects, is each right name above the one with the other's shape? A model that adds up words
                reaches exactly 0, however it weights them. Guessing reaches 25 %, and knowing the big object but
                guessing the other 50 %. A model that likes some names, whatever it sees, can reach 50 %, too
    retrieval   among the held-out scenes, both ways

pointing: where in the image does the highest weight of C^I lie? We ask "there is a NAME", with the object's own name
and, as a control, with an absent name of its colour. The peak is on the object (`it`), on another one, or on the
ground; `area` is a blind guess. For `color`, in scenes of several colours, we ask for an absent name of each colour: is
the peak on an object of that colour, or of another? For `caption` we ask with the whole caption, which names every
object.

handed: what does C^I hand over? We ask it for one object of a scene, and judge its answer alone, without adding the
question. There are figures for the object that the question names (`named`), and for the others (`other`):

    top1        as above, but with the answer instead of the image's vector
    found       take two other scenes, one that has the object and one that does not: is the answer nearer to the first?
                Chance 50 %

and `cosine`: how alike are two answers about one scene, to two different names (`names`)? As a control, to two random
queries (`random`)? And how alike are two answers to one name, about two different scenes (`scenes`)?

conflict: give C^I the sentence of one pair and the image of another. Which of 32 images, as the teacher sees them, does
h_T pick? See section 6. The student reads, whatever --weights says.

The folder given by --shards holds val/, or is a val/. If a set lists no objects, only
`conflict` is measured. A model without cross-attention has only `objects`.
"""
import random
from collections import Counter, defaultdict
from itertools import combinations, islice
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from cosmos import unit
from eval import (Images, class_vectors, embed_images, execute, load, progress, shard_captions,
                  shard_image, zero_shot_retrieval)
from lesson.scenes import ABSENT, COLORS, FORMS, NAMES, SHAPES, mask_of, with_article
from plumbing.captions import sentences
from plumbing.errors import command, need
from plumbing.options import Parser, add_checkpoint
from plumbing.shards import Shards

# --- 1. Scenes and their objects -------------------------------------------------------------------------------------

LISTED = {'role', 'centre', 'absent'}           # sets of another kind, or of an earlier version, lack some


def read_scenes(shards):
    """-> [[object, ...], ...], a list for each scene. Objects that lack a key of LISTED are left out.

    The attributes of an object are what its json lists, its color and shape, its pair, and its number in the mask (from
    1).
    """
    scenes = []
    for pair in range(len(shards)):
        scene = []
        objects = shards.record(pair).get('objects')
        if not isinstance(objects, list):               # other sets may have anything under this key
            objects = []
        for listed in objects:
            if isinstance(listed, dict) and LISTED <= set(listed):
                color, shape = listed['name'].split()
                number = len(scene) + 1
                scene.append(SimpleNamespace(**listed, color=color, shape=shape, pair=pair, number=number))
        scenes.append(scene)
    return scenes


# --- 2. Named and bound ----------------------------------------------------------------------------------------------

COLUMN = {name: k for k, name in enumerate(NAMES)}      # of a table of scores (n images, K names)
TIE = 1e-6                                              # a smaller difference is one of rounding


def name_scores(model, tokenizer, image_features):
    """Cosines of image features (n, D) with all names, in the words of the captions, (n, K)."""
    names = [with_article(name) for name in NAMES]
    return image_features @ class_vectors(model, tokenizer, names, FORMS).T


def scores_of(shards, model, tokenizer, preprocess, workers=0):
    """name_scores of all images of a set."""
    return name_scores(model, tokenizer, embed_images(model, shards, preprocess, workers))


def named(scores, scenes):
    """-> {role: {top1, chance, objects (how many)}}. scores: of all scenes of the set, because their means are
    subtracted."""
    raised = scores - scores.mean(dim=0)
    hits = defaultdict(list)
    for thing in sum(scenes, []):
        row = raised[thing.pair]
        wrong = row[[COLUMN[name] for name in thing.absent]]            # (ABSENT,)
        hits[thing.role].append(bool(row[COLUMN[thing.name]] - wrong.max() > TIE))
    figures = {}
    for role, found in hits.items():
        figures[role] = {'top1': fmean(found), 'chance': 1 / (1 + ABSENT), 'objects': len(found)}
    return figures


def bound(scores, scenes):
    """Over all pairs of objects that differ in colour and in shape -> {dominant_small, small_small (where there are
    such pairs), pairs (how many)}

    Is each right name above the one with the other's shape? If a score is a sum of one for the colour and one for the
    shape, the two differences below are x and -x, so one of them is not above 0.
    """
    found = defaultdict(list)
    for scene in scenes:
        for a, b in combinations(scene, 2):
            if a.color != b.color and a.shape != b.shape:
                row = dict(zip(NAMES, scores[a.pair].tolist()))
                first = row[a.name] - row[f'{a.color} {b.shape}']
                second = row[b.name] - row[f'{b.color} {a.shape}']
                found[f'{a.role}_{b.role}'].append(min(first, second) > TIE)
    figures = {roles: fmean(each) for roles, each in found.items()}
    return figures | {'pairs': sum(map(len, found.values()))}


# --- 3. What models that know little can reach -----------------------------------------------------------------------

SALIENCE = {'dominant': 3, 'small': 1}
LIKED = {name: random.Random(name).random() for name in NAMES}


def area_of(scene, color):
    """How many pixels a colour covers."""
    return sum(thing.area for thing in scene if thing.color == color)


def salience(scene, word):
    """How salient a colour or a shape is: the sum of SALIENCE over the objects that have it."""
    return sum(SALIENCE[thing.role] for thing in scene if word in (thing.color, thing.shape))


def knows_areas(known):
    """Of the known objects whose colour covered as many pixels as this colour does here, what share had this shape?"""
    shapes = defaultdict(Counter)                       # {area: {shape: objects}}
    for scene in known:
        for thing in scene:
            shapes[area_of(scene, thing.color)][thing.shape] += 1

    def score(scene, color, shape):
        count = shapes[area_of(scene, color)]
        return count[shape] / (1 + count.total())
    return score


def knows_biggest(scene, color, shape):
    return scene[0].name == f'{color} {shape}'


def adds_words(scene, color, shape):
    return salience(scene, color) + salience(scene, shape)


def multiplies_words(scene, color, shape):
    return salience(scene, color) * salience(scene, shape)


def likes_names(scene, color, shape):
    """Likes some names more than others, whatever the scene."""
    return LIKED[f'{color} {shape}']


def score_table(scenes, score):
    """What a formula score(scene, color, shape) gives for all scenes and names, (n, K)."""
    rows = []
    for scene in scenes:
        rows.append([score(scene, *name.split()) for name in NAMES])
    return torch.tensor(rows, dtype=torch.double)


def adversaries(known, scenes):
    """What formulas that know little get from the measures -> {who: figures}. known: training scenes."""
    formulas = {
        'areas': knows_areas(known),
        'biggest': knows_biggest,
        'sums': adds_words,
        'products': multiplies_words,
        'likes': likes_names}
    figures = {}
    for who, score in formulas.items():
        scores = score_table(scenes, score)
        figures[who] = named(scores, scenes)
        figures[who]['bound'] = bound(scores, scenes)
    return figures


def oracles(scenes):
    """R@1 among these scenes of an oracle that knows only the colours of each scene and caption, and of one that knows
    all names. Scenes that look the same to an oracle tie, and a tie of k is won once in k times."""
    figures = {}
    for fact in ('color', 'name'):
        known = []
        for scene in scenes:
            known.append(', '.join(sorted(vars(thing)[fact] for thing in scene)))
        alike = Counter(known)
        figures[f'{fact}s'] = fmean(1 / alike[each] for each in known)
    return figures


# --- 4. Where C^I looks ----------------------------------------------------------------------------------------------

def question(name):
    return FORMS[0].format(with_article(name))          # 'there is a red star'


def objects_at(scene, config):
    """The number of the object in the middle of each patch, 0 for the ground, (P,)."""
    mask = Image.fromarray(mask_of(scene)).resize((config.image_size, config.image_size), Image.NEAREST)
    p = config.patch_size
    return pil_to_tensor(mask)[0, p // 2::p, p // 2::p].flatten()


@torch.no_grad()
def pointing(model, tokenizer, preprocess, shards, scenes):
    """Where does the highest weight of C^I lie? -> {role: {own_it, own_other, ...: shares of its objects}}.

    own_, absent_: asked for the object, and for an absent name of its colour. area_: what a blind guess among all
    patches hits. it: on the object; other: on another one; ground.

    And {'color': {asked, other}} over the scenes of several colours. Each of these colours is asked for once. So in
    scenes of two colours, a model that looks at one place whatever is asked has equal shares of `asked` and `other`.

    And {'caption': {dominant, small, ground}}, asked with the whole caption, which names every object.
    """
    device = model.logit_scale.device
    questions = tokenizer(list(map(question, NAMES)))
    eot, _ = model.encode_text(questions.to(device))                    # (K, D)
    captions, _ = texts_of(*shard_captions(shards))
    found = defaultdict(lambda: defaultdict(list))                      # by role and figure
    for pair, scene in enumerate(progress(scenes, 'maps')):
        image = preprocess(shard_image(shards, pair))
        _, patches = model.encode_image(image[None].to(device))         # (1, P, D)
        numbers = objects_at(scene, model.config)                # (P,)
        peaks = {}                                          # {colour asked for: number of the object at the peak}
        for thing in scene:
            asked = [COLUMN[thing.name], COLUMN[thing.absent[0]]]
            weights = model.image_cross.weights(eot[asked], patches.expand(2, -1, -1))
            own, absent = numbers[weights.argmax(dim=1).cpu()].split(1)
            peaks[thing.color] = absent.item()              # the control serves for `color`, too
            for prefix, there in ('own', own), ('absent', absent), ('area', numbers):
                on_it = there == thing.number
                ground = there == 0
                for place, hits in ('it', on_it), ('other', ~on_it & ~ground), ('ground', ground):
                    found[thing.role][f'{prefix}_{place}'].append(hits.double().mean().item())
        if len(peaks) > 1:
            color_of = {thing.number: thing.color for thing in scene}
            for asked_color, number in peaks.items():
                there = color_of.get(number)                # None: the ground
                found['color']['asked'].append(there == asked_color)
                found['color']['other'].append(there not in (asked_color, None))
        caption_eot, _ = model.encode_text(tokenizer([captions[pair]]).to(device))
        peak = numbers[model.image_cross.weights(caption_eot, patches).argmax().item()]
        roles = {thing.number: thing.role for thing in scene}
        for place in 'dominant', 'small', 'ground':
            found['caption'][place].append(roles.get(peak.item(), 'ground') == place)
    figures = {}
    for role, columns in found.items():
        figures[role] = {name: fmean(values) for name, values in columns.items()}
    return figures


# --- 5. What C^I hands over ------------------------------------------------------------------------------------------

def answers_to(model, query, patches):
    """What C^I hands over about each scene, without the query itself. query (D,), patches (n, P, D) -> (n, D), of unit
    length."""
    return unit(model.image_cross(query.expand(1, len(patches), -1), patches)[0])


def likeness(model, queries, patches):
    """queries (m, D), patches (n, P, D) -> the mean cosine of two answers to different queries about one scene, and of
    two answers to one query about different scenes."""
    m, n = len(queries), len(patches)
    total = 0.0                         # the sum of all answers about a scene, (n, D)
    between_scenes = 0.0
    for query in queries:
        answers = answers_to(model, query, patches)
        total = total + answers
        # |a_1 + ... + a_n|² = n + the sum of the cosines of all ordered pairs, because every answer has unit length.
        between_scenes += (answers.sum(dim=0).square().sum().item() - n) / (n * (n - 1))
    between_queries = (total.square().sum(dim=1).mean().item() - m) / (m * (m - 1))
    return between_queries, between_scenes / m


@torch.no_grad()
def handed(model, tokenizer, preprocess, shards, scenes):
    """C^I is asked for one object of a scene. What does its answer tell of this object, and of the others?
    -> {role: {named_top1, named_found, other_top1, other_found}}, shares of the objects, and {'cosine': {names,
    random, scenes}}; see the head of this file. Only names that the scenes have are asked for.

    An object counts under `other` once for each other object of its scene, namely when C^I is asked for that one. From
    each score its mean over all scenes is subtracted, so what the question itself adds to an answer does not matter.
    """
    device = model.logit_scale.device
    cls, patches = [], []
    for pixels in DataLoader(Images(shards, preprocess), 100):
        encoded = model.encode_image(pixels.to(device))
        cls.append(unit(encoded[0]))
        patches.append(encoded[1])
    cls = torch.cat(cls)                                                # (n, D)
    patches = torch.cat(patches)                                        # (n, P, D)
    names = class_vectors(model, tokenizer, list(map(with_article, NAMES)), FORMS)      # (K, D)
    has = torch.zeros(len(scenes), len(NAMES), dtype=torch.bool)        # which scene has an object of which name
    for thing in sum(scenes, []):
        has[thing.pair, COLUMN[thing.name]] = True
    present = [name for name in NAMES if has[:, COLUMN[name]].any()]
    queries, _ = model.encode_text(tokenizer(list(map(question, present))).to(device))      # (m, D)
    found = defaultdict(lambda: defaultdict(list))                      # by role and figure
    for asked, query in progress(list(zip(present, queries)), 'handed'):
        answers = answers_to(model, query, patches)
        told = (answers @ names.to(device).T).cpu()                     # (n, K)
        near = (answers @ cls.T).cpu()                                  # (n, n)
        told -= told.mean(dim=0)
        near -= near.mean(dim=0)
        for pair in has[:, COLUMN[asked]].nonzero()[:, 0].tolist():
            for thing in scenes[pair]:
                who = 'named' if thing.name == asked else 'other'
                wrong = told[pair, [COLUMN[name] for name in thing.absent]]
                top1 = told[pair, COLUMN[thing.name]] - wrong.max() > TIE
                found[thing.role][f'{who}_top1'].append(top1.item())
                has_it = has[:, COLUMN[thing.name]].clone()
                has_it[pair] = False
                has_not = ~has[:, COLUMN[thing.name]]
                if has_it.any():                        # another scene
                    nearer = near[pair, has_it][:, None] > near[pair, has_not]
                    found[thing.role][f'{who}_found'].append(nearer.double().mean().item())
    figures = {}
    for role, columns in found.items():
        figures[role] = {name: fmean(values) for name, values in columns.items()}
    between_names, between_scenes = likeness(model, queries, patches)
    random_queries = torch.randn(queries.shape, generator=torch.Generator().manual_seed(0)).to(device)
    between_random, _ = likeness(model, random_queries * queries.std(), patches)
    figures['cosine'] = {'names': between_names, 'random': between_random, 'scenes': between_scenes}
    return figures


# --- 6. Conflict: the sentence of one pair, the image of another -----------------------------------------------------

# In groups of 32 pairs, the student's h_T must pick among the teacher's cls_t of the 32 images. For h_I the roles are
# swapped: its queries are images, it reads captions, and it picks among the teacher's eot_t of these captions.
#
#     own         it reads its own image: does it pick that image?
#     sentence    it reads its neighbour's image: does it pick the image of its sentence (h_I: the image's caption),
#     read        or the one that it has read?
#     alone       it reads nothing, so eot (h_I: cls) must pick: the most that `sentence` can be expected to reach
#     kept        it reads its neighbour's image, and must find its caption's eot_t (h_I: its image's cls_t)
#
# No figure means much by itself, as these cheats show. A model that only copies what it reads reaches 100 % at `own`
# and `read`, and 0 at `sentence` and `kept`, whatever it knows about sentences. A model with one eot for all sentences
# can reach the same, and 3.1 % at `alone`. In a model that reads nothing, `own` and `sentence` equal `alone`, and
# `read` is nearly 0. A model with the same towers comes near to that if it scales down what it has read, to a tenth of
# C^I. A model that answers with the mean of all cls_t picks one image for all and has 3.1 % everywhere, or picks none
# if all are equally near. So a high `own` proves nothing, and a high `sentence` proves something only if `own` is above
# `alone`. h_T of `across` was never trained to find cls_t, so its low `read` proves little. And if the neighbour's
# image shows what the sentence says, picking it is no mistake; with whole captions that is rarer.
#
# With fewer than 32 pairs the groups are smaller, and chance is higher.

GROUP = 32
GROUPS = 30             # at most; they have 960 pairs


def picks(vectors, candidates, right):
    """The share of vectors (B, D) that are nearest to candidate right (B,) of (B, D); a tie is a miss."""
    cosines = vectors @ candidates.T                                    # (B, B)
    wanted = right[:, None]
    others = cosines.scatter(1, wanted, -torch.inf)
    hits = cosines.gather(1, wanted)[:, 0] - others.amax(dim=1) > TIE
    return hits.double().mean().item()


def picked(queries, tokens, cross, candidates, of_own_kind):
    """What a group of pairs picks -> {own, sentence, read, alone, kept}.

    queries (B, D): the sentences, not of unit length. tokens (B, R, D): what cross (C^I) reads of the images.
    candidates (B, D): the teacher's images, of unit length. of_own_kind (B, D): the teacher's captions.
    """
    places = torch.arange(len(queries), device=queries.device)
    neighbours = places.roll(1)
    h = unit(cross(queries[None], tokens)[0] + queries)                 # Eq. 2
    h_other = unit(cross(queries[None], tokens[neighbours])[0] + queries)
    return {
        'own': picks(h, candidates, places),
        'sentence': picks(h_other, candidates, places),
        'read': picks(h_other, candidates, neighbours),
        'alone': picks(unit(queries), candidates, places),
        'kept': picks(h_other, of_own_kind, places)}


@torch.no_grad()
def answers_of(student, teacher, pixels, question_ids, caption_ids):
    """A group of pairs -> {h_T, h_T_caption, h_I: {own, sentence, read, alone, kept}}. ids (B, T) keep their padding,
    because C^T has learnt to read it."""
    device = student.logit_scale.device
    pixels = pixels.to(device)
    caption_ids = caption_ids.to(device)
    cls, patches = student.encode_image(pixels)
    question_eot, _ = student.encode_text(question_ids.to(device))
    caption_eot, words = student.encode_text(caption_ids)
    cls_t = unit(teacher.encode_image(pixels)[0])
    eot_t = unit(teacher.encode_text(caption_ids)[0])
    return {
        'h_T': picked(question_eot, patches, student.image_cross, cls_t, eot_t),
        'h_T_caption': picked(caption_eot, patches, student.image_cross, cls_t, eot_t),
        'h_I': picked(cls, words, student.text_cross, eot_t, cls_t)}


def conflict(args, source, captions, questions):
    """Does h_T say what the sentence says, or what it has read? -> {h_T, h_T_caption, h_I: {own, sentence, read,
    alone, kept}}, shares of the pairs.

    The student of args.checkpoint reads, and its teacher gives the targets; if the file holds one network, it does
    both. source: images, as eval.Images takes them. questions (for h_T) and captions: one for each image.
    """
    student, tokenizer, preprocess = load(args.checkpoint, 'student', args.vocab)
    teacher, *_ = load(args.checkpoint, 'teacher', args.vocab)
    if student.origin == teacher.origin:
        print(f'conflict   there is one network, the {student.origin}, so it also gives the targets')
    student.to(args.device)
    teacher.to(args.device)
    size = min(GROUP, len(captions))
    need(size > 1, 'there is one pair; conflict needs two or more')
    found = []                                          # of each group
    groups = DataLoader(Images(source, preprocess), size, num_workers=args.workers, drop_last=True)
    for number, pixels in enumerate(islice(progress(groups, 'conflict'), GROUPS)):
        group = slice(number * size, (number + 1) * size)
        ids = tokenizer(questions[group]), tokenizer(captions[group])
        found.append(answers_of(student, teacher, pixels, *ids))
    figures = {}
    for who, answered in found[0].items():
        figures[who] = {name: fmean(group[who][name] for group in found) for name in answered}
    return figures


def texts_of(captions, owner):
    """All captions, and which image each belongs to -> the first caption of each image, and its first sentence."""
    firsts = {}
    for caption, image in zip(captions, owner.tolist()):
        firsts.setdefault(image, caption)
    whole = list(firsts.values())
    return whole, [(sentences(caption) or [caption])[0] for caption in whole]


def conflict_in_shards(args, shards, scenes):
    """`conflict` on held-out shards. The question about a scene names one of its objects: in scene 0 the first, in
    scene 1 the second, and so on in turn. If a scene lists none, it is the first sentence of its first caption."""
    captions, questions = texts_of(*shard_captions(shards))
    for pair, scene in enumerate(scenes):
        if scene:
            thing = scene[pair % len(scene)]
            questions[pair] = question(thing.name)
    return conflict(args, shards, captions, questions)


# --- 7. During training, and the command -----------------------------------------------------------------------------

def scene_figures(model, tokenizer, preprocess, image_features, shards):
    """The figures of held-out scenes, which train.py writes to eval.json; {} if the set lists no objects, or none with
    all keys of LISTED."""
    if not shards.record(0).get('objects'):             # reading all records takes a while
        return {}
    scenes = read_scenes(shards)
    if not any(scenes):
        return {}
    scores = name_scores(model, tokenizer, image_features)
    return named(scores, scenes) | {'bound': bound(scores, scenes)}


class Named:
    """A watcher that tells train.main the figures of held-out scenes."""

    def begin(self, run):
        """Nothing to prepare."""

    def evaluated(self, run, seen):
        return scene_figures(seen.model, seen.tokenizer, seen.preprocess, seen.image_features, seen.val)

    def finish(self, run):
        """Nothing to write."""


def measure_objects(args, scored, shards, scenes):
    ranking, features = zero_shot_retrieval(*scored, shards, workers=args.workers)
    scores = name_scores(*scored[:2], features)
    return named(scores, scenes) | {'bound': bound(scores, scenes), 'retrieval': ranking}


def measure_pointing(args, scored, shards, scenes):
    return {'pointing': pointing(*scored, shards, scenes)}


def measure_handed(args, scored, shards, scenes):
    return {'handed': handed(*scored, shards, scenes)}


def measure_conflict(args, scored, shards, scenes):
    return {'conflict': conflict_in_shards(args, shards, scenes)}


MEASURES = {
    'objects': measure_objects, 'pointing': measure_pointing, 'handed': measure_handed, 'conflict': measure_conflict}


def measure(args, model, tokenizer, preprocess):
    """The figures that args.only names, or all that this model and this set have."""
    shards = Shards(args.shards, split='val')
    scenes = read_scenes(shards)
    possible = list(MEASURES)
    if not model.has_cross_attention:
        possible = ['objects']
        need(args.only in (None, 'objects'),
             f'{args.checkpoint} has no cross-attention, so --only {args.only} has nothing to measure; '
             'give --only objects')
    if not any(scenes):
        possible = [name for name in possible if name == 'conflict']
        need(possible and args.only in (None, 'conflict'),
             f'{Path(shards.paths[0]).parent} lists no objects with centres and absent names; '
             'draw a set by python -m lesson.scenes')
    wanted = [args.only] if args.only else possible
    figures = {}
    for name in wanted:
        print(f'measuring  {name}')
        figures |= MEASURES[name](args, (model, tokenizer, preprocess), shards, scenes)
    return figures


def main():
    parser = Parser(
        prog='python -m lesson.suppression',
        description='What a checkpoint knows about the objects of scenes.')
    add_checkpoint(parser)
    parser.set_defaults(command='suppression', function=measure)
    parser.add_argument('--shards', required=True,
                        help='a set of scenes, as runs/scenes, or its val/; conflict also takes other held-out shards')
    parser.add_argument('--only', choices=MEASURES, help='one group of figures, instead of all')
    execute(parser.parse_args())


if __name__ == '__main__':
    command(main)
