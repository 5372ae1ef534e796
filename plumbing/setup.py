"""How a run of train.py is set up: its options, data and model are chosen and checked, and put together.

This is the only module here that imports data.py and eval.py. Only train.py imports it, and hands it what stands there
to be read: the presets, the methods, Run and make_optimizer.
"""
from argparse import Namespace
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

import data
import eval as evaluation
from cosmos import GLOBALS, Teacher
from data import Shards
from plumbing import runs
from plumbing.errors import need, note
from plumbing.options import choose_data, settle
from plumbing.parts import StudentInParts
from plumbing.processes import choose_dtype, compile_blocks, keep_memory, use_cores
from plumbing.tokenizer import Tokenizer, learn_merges
from plumbing.weights import config_and_tokenizer


# --- 1. Options, data and model --------------------------------------------------------------------------------------

class Inputs(NamedTuple):
    """What a run is made from."""
    options: Namespace
    method: NamedTuple      # the row of METHODS that --method names
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
        index = f'{out}/index.npy'          # in truth index-MARK.npy
        shards = Shards(paths, unsettled['caption_keys'], 'train', index=index)
        config, tokenizer, weights = choose_model(unsettled, saved, presets, methods)
        batch_before = saved['options']['batch'] if saved else None
        options = settle(unsettled, typed, len(shards), parts, batch_before)
        check_batch(options.batch, len(shards), parts)
        if saved and processes.rank == 0:               # others are compared with rank 0 below
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
    method = methods[options.method]
    train_set = make_train_set(options, shards, tokenizer, config, method)
    return Inputs(options, method, train_set, val, weights, saved.get('step', 0))


def check_batch(batch, pairs, parts):
    """Raises Refused for a batch that the set cannot fill, or that cannot be cut into equal parts."""
    need(batch <= pairs, f'--batch {batch} is larger than the set of {pairs} pairs; lower --batch')
    need(batch % parts == 0, f'--batch {batch} cannot be cut into {parts} parts (processes x --accum); '
         f'choose a multiple of {parts}')


def check_ranks(options, shards, saved, processes):
    """If ranks disagreed on batches or learning rates, training would go on without an error. So each compares its
    options with rank 0's. Two last.pt count as the same if their running times are equal."""
    mine = vars(options) | {
        'pairs': len(shards), 'fingerprint': shards.fingerprint, 'last.pt': saved.get('seconds'),
        'workers': None, 'data': None,                      # these may differ between ranks
        'vocab': options.vocab == 'learn', 'val': bool(options.val)}    # and these in where their files lie
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
        model, tokenizer, _ = evaluation.load(
            unsettled['init'], vocab=vocab, quick_gelu=unsettled['quick_gelu'])
        note(f'--init is the {model.origin}')
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


# --- 2. The run ------------------------------------------------------------------------------------------------------

def make_run(inputs, processes, Run, make_optimizer):
    """-> this process's train.Run, as it stands before its first step, or as its last.pt says."""
    options = inputs.options
    method = inputs.method
    train_set = inputs.train_set
    device = processes.device
    dtype = choose_dtype(options.precision, device)
    order = data.Order(len(train_set.shards), options.batch, inputs.resumed_step, options.steps,
                       options.seed, processes.rank, processes.world)
    multiple = 8 if dtype else 1        # caption lengths are rounded up to it: faster in half precision
    # The loader forks its workers here, before DDP starts nccl, because a fork beside nccl may hang. (Until then ranks
    # talk through gloo.) Evaluations fork later, but their loaders end with an error if a worker hangs.
    # whole_first: caption 0 is not cut, because C^T reads its padding, too.
    batches = iter(data.loader(train_set, order, options.workers, device, multiple,
                               whole_first=method.has_cross_attention))
    torch.manual_seed(options.seed)                     # all ranks start from the same weights
    student = method.student(train_set.config).to(device)
    if inputs.weights:      # they may lack cross-attention, or have it although this model does not
        missing = student.load_state_dict(inputs.weights, strict=False).missing_keys
        print(f'init       {len(missing)} tensors that {options.init} lacks start fresh')
    teacher = Teacher(student) if method.has_teacher else None
    if options.compile:
        compile_blocks(student)
        if teacher:
            compile_blocks(teacher.model)
    student_to_call = StudentInParts(student, options.accum)
    if processes.world > 1:
        student_to_call = DistributedDataParallel(student_to_call, gradient_as_bucket_view=True)
    run = Run(
        options=options, method=method, processes=processes, train_set=train_set,
        student=student, student_to_call=student_to_call, teacher=teacher,
        optimizer=make_optimizer(student, options.lr, options.wd),
        # With torch's own initial scale, 65,536, the first steps would overflow again and again.
        scaler=torch.amp.GradScaler(device.type, 1024.0, enabled=dtype == torch.float16),
        dtype=dtype, batches=batches)
    if inputs.resumed_step:
        runs.restore(run, inputs.resumed_step)
    return run
