"""How a run of train.py is set up: its options, data and model are chosen, and checked before a step is taken.

This is the only module here that imports data.py and eval.py. Only train.py imports it, and hands it its tables, so that
they stand where they are read.
"""
from argparse import Namespace
from dataclasses import replace
from typing import NamedTuple

import data
import eval as evaluation
from cosmos import GLOBALS
from data import Shards
from plumbing import runs
from plumbing.errors import need
from plumbing.options import choose_data, settle
from plumbing.processes import keep_memory, use_cores
from plumbing.tokenizer import Tokenizer, learn_merges
from plumbing.weights import config_and_tokenizer


class Inputs(NamedTuple):
    """What a run is made from."""
    options: Namespace
    train_set: data.TrainingSet
    val: Shards             # the held-out shards, on rank 0 only; None if there are none
    weights: dict           # to start from; {}: the student starts at random
    resumed_step: int       # the step of the last.pt to go on from; 0 for a new run


def choose_inputs(unsettled, typed, processes, built_in_set, presets, methods):
    """What train.read_options gives, and train.py's tables -> Inputs."""
    if processes.device.type == 'cpu':
        keep_memory()
        use_cores(unsettled['workers'])
    parts = processes.world * unsettled['accum']        # into which a batch is cut
    val = None
    # Rank 0 goes first, because it may fetch CLIP's vocabulary, and writes the index of the shards.
    with processes.rank_0_first():
        out = unsettled['out']
        saved = runs.read_last(out, unsettled['resume'])            # {} for a new run
        paths, held_out = choose_data(unsettled, built_in_set)
        unsettled = unsettled | {'data': paths, 'val': held_out}
        shards = Shards(paths, unsettled['caption_keys'], 'train', index=f'{out}/index.npy')    # index-MARK.npy
        config, tokenizer, weights = choose_model(unsettled, saved, presets, methods)
        batch_before = saved['options']['batch'] if saved else None
        options = settle(unsettled, typed, len(shards), parts, batch_before)
        check_batch(options.batch, len(shards), parts)
        if saved:
            runs.check_resumed(saved, options, shards)
        if processes.rank == 0 and options.val:
            val = Shards(options.val, options.caption_keys, 'val')
        if processes.rank == 0:
            runs.lock(options.out)          # nothing is written to --out before this line
            shards.save()                   # the other ranks will memory-map it
    check_ranks(options, shards, saved, processes)
    if tokenizer is None:
        merges = processes.broadcast(learn_merges(shards) if processes.rank == 0 else None)
        tokenizer = Tokenizer(merges, config.context_length)
        config = replace(config, vocab_size=tokenizer.vocab_size)
    train_set = make_train_set(options, shards, tokenizer, config, methods[options.method])
    return Inputs(options, train_set, val, weights, saved.get('step', 0))


def check_batch(batch, pairs, parts):
    """Raises Refused for a batch that the set cannot fill, or that cannot be cut into equal parts."""
    need(batch <= pairs, f'--batch {batch} is larger than the set of {pairs} pairs; lower --batch')
    need(batch % parts == 0,
         f'--batch {batch} cannot be cut into {parts} parts (processes x --accum); choose a multiple of {parts}')


def check_ranks(options, shards, saved, processes):
    """If ranks disagreed on batches or learning rates, training would go on without an error. So each compares its
    options with rank 0's. Two last.pt count as the same if their running times are equal."""
    mine = vars(options) | {'pairs': len(shards), 'fingerprint': shards.fingerprint, 'last.pt': saved.get('seconds')}
    # None: may differ between ranks. Of vocab and val only this must agree: learned or not, held-out data or none.
    mine |= {'workers': None, 'data': None, 'vocab': options.vocab == 'learn', 'val': bool(options.val)}
    need(processes.broadcast(mine) == mine, 'options, shards or last.pt are not the same for all processes; '
         'give all nodes the same command, the same files in --data, and one --out that all see')


def choose_model(unsettled, saved, presets, methods):
    """-> Config, tokenizer (None if it must be learned), weights to start from ({}: none).

    A resumed run takes Config and tokenizer from its checkpoint, and its weights later. --init gives all three: the
    teacher's weights if the file is ours, and CLIP's tokenizer if the file has none. Otherwise --preset gives the
    Config, and --vocab the tokenizer. In a new run, --method decides on cross-attention and a second scale.
    """
    if saved:
        return *config_and_tokenizer(saved), {}
    vocab = unsettled['vocab']          # clip, learn, or a path; with --init a path, or None
    tokenizer = None
    weights = {}
    config = presets[unsettled['preset']].sizes
    if unsettled['init']:
        model, tokenizer, _ = evaluation.load(unsettled['init'], vocab=vocab, quick_gelu=unsettled['quick_gelu'])
        config = model.config
        weights = model.state_dict()
    elif vocab != 'learn':
        tokenizer = Tokenizer.clip(None if vocab == 'clip' else vocab, config.context_length)
    method = methods[unsettled['method']]
    heads = 0
    if method.has_cross_attention:      # those of --init; if it has none, as many as a preset of its width has
        heads = config.cross_heads or (8 if config.embed_dim >= 256 else 4)
    return replace(config, cross_heads=heads, two_scales=method.two_scales), tokenizer, weights


def make_train_set(options, shards, tokenizer, config, method):
    counts = data.Counts(
        global_images=method.global_images,
        local_images=options.local_crops or 0,          # None if the method has none
        global_texts=GLOBALS if method.has_text_crops else 1,
        local_texts=options.local_captions or 0)
    return method.train_set(shards, tokenizer, config, options.seed, counts,
                            augment=options.augment, crop_min=method.crop_min)
