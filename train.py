"""Train COSMOS: one step, many times, on 1 to N GPUs, resumable.

    python train.py                                             the built-in set on a laptop: minutes, see README
    python train.py --data /shards --preset vit-b-16            one GPU
    torchrun --nproc_per_node=8 train.py --data /shards         one node; the paper's recipe for vit-b-16
    python train.py --resume auto                               goes on where the newest checkpoint in --out stopped

Ends with a checkpoint, figures and pictures in --out: last.pt, log.jsonl, config.json, samples.png, attention.png, eval.json.
"""
import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import re
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval as evaluation
from cosmos import COSMOS, Config, Teacher, clip_loss, cosmos_terms
from data import Order, Parser, Shards, Tokenizer, Views, cli, loader, make_scenes, sample_sheet

# ---------------------------------------------------------------------------------------------------------------------
# 1. Options: one list, whose comments are the --help
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    data: str = None             # shards to train on: a folder, glob or brace pattern of tars; none: the built-in set
    val: str = None              # held-out shards, evaluated every --eval-every steps and at the end
    out: str = None              # folder of checkpoint, log and pictures; default runs/PRESET-METHOD
    preset: str = None           # vit-b-16, vit-b-32, vit-s-16 or tiny; default tiny without --data, else vit-b-16
    method: str = 'cosmos'       # cosmos, or clip: one image crop and one caption of 1-5 sentences, no teacher
    steps: int = None            # optimizer steps in all (default: of the preset)
    epochs: float = None         # instead of --steps: passes over the data
    batch: int = None            # pairs per step over all processes (default: of the preset)
    lr: float = None             # peak learning rate (default: of the preset)
    warmup: int = None           # steps of linear warm-up before the cosine (default: of the preset)
    wd: float = None             # AdamW weight decay of matrices; vectors and scales have none (default: of the preset)
    momentum: float = None       # lambda of the teacher (default: of the preset)
    momentum_ramp: int = None    # R: momentum at step s is at most s / (s + R), for short runs; 0 is fixed, as in the paper
    clip_grad: float = 0.0       # largest gradient norm; 0 does not clip, as released
    local_crops: int = 6         # local image views per pair
    local_captions: int = 6      # single-sentence captions per pair
    augment: str = None          # full: the released colour, flip and blur; crops: crops alone (default: of the preset)
    caption_keys: str = None     # comma-separated json keys of the captions; default: DreamLIP's, PixelProse's, captions, ...
    vocab: str = None            # clip, learn (from the captions), or a path to CLIP's merges (default: of the preset)
    precision: str = 'auto'      # auto, fp32, bf16 or fp16; auto is bf16 where the hardware has it
    device: str = 'auto'         # auto, cuda, mps or cpu
    workers: int = None          # loader processes per training process; default 8 on a GPU, 1 on a CPU
    seed: int = 0                # of everything random
    resume: str = None           # a checkpoint, or auto: the newest in --out, or a fresh start
    save_every: int = 1000       # steps between checkpoints; one is always written at the end
    eval_every: int = 0          # steps between evaluations on --val; 0: only at the end
    log_every: int = 20          # steps between log lines
    compile: bool = False        # torch.compile the student; for GPUs, on CPUs it gains nothing
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, about a third more time


RECIPES = {     # of the paper (released train_cc3m.sh; batch 4096 and momentum 0.99 for the larger sets), and of the lesson
    'vit-b-16': dict(epochs=32, batch=1024, lr=5e-4, warmup=2000, wd=0.5, momentum=0.999, momentum_ramp=0, augment='full',
                     vocab='clip'),
    'tiny': dict(steps=300, batch=64, lr=1e-3, warmup=50, wd=0.1, momentum=0.99, momentum_ramp=10, augment='crops',
                 vocab='learn'),
}
RECIPES['vit-b-32'] = RECIPES['vit-s-16'] = RECIPES['vit-b-16']


def parse_options(argv=None):
    """Options from the command line, preset defaults filled in. --help is made of the comments above."""
    parser = Parser(description=__doc__.split('\n')[0])
    comments = dict(re.findall(r'^    (\w+): .*?# (.*)$', inspect.getsource(Options), re.M))
    for field in dataclasses.fields(Options):
        flag, help = '--' + field.name.replace('_', '-'), comments[field.name].replace('%', '%%')
        if field.type is bool:
            parser.add_argument(flag, action='store_true', help=help)
        else:
            parser.add_argument(flag, type=field.type, default=field.default, help=help)
    options = Options(**vars(parser.parse_args(argv)))
    options.preset = options.preset or ('vit-b-16' if options.data else 'tiny')
    Config.preset(options.preset)                                       # raises for an unknown name
    for name, allowed in (('method', ('cosmos', 'clip')), ('precision', ('auto', 'fp32', 'bf16', 'fp16')),
                          ('augment', (None, 'full', 'crops')), ('device', ('auto', 'cuda', 'mps', 'cpu'))):
        if getattr(options, name) not in allowed:
            raise ValueError(f"unknown --{name} '{getattr(options, name)}'; choose from {', '.join(filter(None, allowed))}")
    recipe = dict(RECIPES[options.preset])
    if options.steps or options.epochs:
        recipe.pop('steps', None), recipe.pop('epochs', None)
    for name, value in recipe.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.out = options.out or f'runs/{options.preset}-{options.method}'
    if options.batch < 2:
        raise ValueError(f'--batch {options.batch} leaves no wrong answer to tell from; use at least 2')
    return options


# ---------------------------------------------------------------------------------------------------------------------
# 2. Where it runs
# ---------------------------------------------------------------------------------------------------------------------


def setup(options):
    """-> (rank, world, device). torchrun's environment is the only switch; alone, the same code runs with world 1."""
    kind = options.device
    if kind == 'auto':
        kind = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if 'RANK' not in os.environ:
        return 0, 1, torch.device(kind)
    local = int(os.environ['LOCAL_RANK'])
    if kind == 'cuda':
        torch.cuda.set_device(local)
    dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
    return dist.get_rank(), dist.get_world_size(), torch.device(kind, local if kind == 'cuda' else None)


def hardware_bf16(device):
    """Whether bfloat16 is faster than float32 here. A CPU without units for it computes it, but slower."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has = lambda name: bool(getattr(torch.cpu, name, lambda: False)())  # private, so absent from some versions
    return device.type == 'cpu' and (has('_is_avx512_bf16_supported') or has('_is_amx_tile_supported'))


def choose_precision(name, device):
    """-> (name, autocast dtype or None)."""
    if name == 'auto':
        name = 'bf16' if hardware_bf16(device) else 'fp32'
    return name, {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': None}[name]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Schedules, pure functions of the step (from 0), and the optimizer
# ---------------------------------------------------------------------------------------------------------------------


def lr_at(step, options):
    """Linear warm-up to the peak, then a cosine to 0 (scheduler.py:43-53 of the released code)."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return options.lr * (1 + math.cos(math.pi * done)) / 2


def momentum_at(step, options):
    """The teacher's momentum. A fixed one never forgets the random start within a short run, hence the ramp."""
    return min(options.momentum, (step + 1) / (step + 1 + options.momentum_ramp))


def make_optimizer(model, options, device):
    """AdamW; no decay for vectors (LayerNorm, biases) and the two scales (main.py:373-392 of the released code)."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{'params': matrices, 'weight_decay': options.wd}, {'params': vectors, 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), eps=1e-8, fused=device.type in ('cuda', 'cpu'))


# ---------------------------------------------------------------------------------------------------------------------
# 4. The run: what is trained, and how it is saved
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """Model, teacher, optimizer and data of one training run."""

    def __init__(self, options, rank, world, device):
        self.options, self.rank, self.world, self.device, self.step = options, rank, world, device, 0
        self.out, self.main, self.cosmos = Path(options.out), rank == 0, options.method == 'cosmos'
        self.precision, self.dtype = choose_precision(options.precision, device)
        saved = self.find_checkpoint()
        self.open_data(saved)
        torch.manual_seed(options.seed)                                 # every rank starts from the same weights
        self.model = COSMOS(self.config).to(device)
        self.model.set_grad_checkpointing(options.grad_checkpoint)
        self.teacher = Teacher(self.model) if self.cosmos else None
        self.optimizer = make_optimizer(self.model, options, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == 'fp16')
        if saved:
            self.restore(saved)
        if options.compile:
            self.model.compile(dynamic=True)                            # in place: parameter names stay as they are
        self.student = self.model                                       # what forward is called on
        if world > 1:
            self.student = DistributedDataParallel(self.model, device_ids=[device.index] if device.type == 'cuda' else None,
                                                   gradient_as_bucket_view=True)

    def open_data(self, saved):
        options = self.options
        keys = options.caption_keys.split(',') if options.caption_keys else None
        with self.main_first():                                         # it writes the index, the others read it
            self.shards = Shards(options.data, cache=self.out, caption_keys=keys)
            self.val = Shards(options.val, cache=self.out) if options.val else None
        if saved:
            self.config, self.tokenizer = Config(**saved['config']), Tokenizer(saved['merges'], saved['config']['context_length'])
        else:
            self.tokenizer = make_tokenizer(options.vocab, self.shards, Config.preset(options.preset).context_length)
            changes = {} if self.cosmos else {'cross_heads': 0}         # a plain CLIP has no heads that would lack a gradient
            self.config = Config.preset(options.preset, vocab_size=self.tokenizer.vocab_size, **changes)
        if options.steps is None:
            options.steps = max(1, round(options.epochs * (len(self.shards) // options.batch)))
        local = dict(local_crops=options.local_crops, local_captions=options.local_captions) if self.cosmos else {
            'globals_': 1, 'local_crops': 0, 'local_captions': 0}
        self.views = Views(self.shards, self.tokenizer, self.config, options.seed, options.batch, augment=options.augment, **local)

    @contextlib.contextmanager
    def main_first(self):
        """Rank 0 runs the body before the others do."""
        if self.world > 1 and not self.main:
            dist.barrier()
        yield
        if self.world > 1 and self.main:
            dist.barrier()

    def batches(self):
        """Batches from the current step to the last; the same global batch at any number of processes and workers."""
        options, workers = self.options, self.options.workers
        if workers is None:
            workers = 8 if self.device.type == 'cuda' else 1
        sampler = Order(len(self.shards), options.batch, self.step, options.steps, options.seed, self.rank, self.world)
        return iter(loader(self.views, sampler, workers))

    def find_checkpoint(self):
        path = self.options.resume
        if path == 'auto':
            path = self.out / 'last.pt'
            if not path.exists():
                return None
        return evaluation.read_checkpoint(path) if path else None

    def restore(self, saved):
        if saved['options']['method'] != self.options.method:
            raise ValueError(f"the checkpoint was trained with --method {saved['options']['method']}, not {self.options.method}")
        evaluation.load_weights(self.model, saved['student'], 'the checkpoint')
        if self.teacher:
            evaluation.load_weights(self.teacher.model, saved['teacher'], 'the checkpoint')
        self.optimizer.load_state_dict(saved['optimizer'])
        self.scaler.load_state_dict(saved['scaler'])
        self.step = saved['step']
        now = dataclasses.asdict(self.options)
        changed = [f'--{name} {saved["options"][name]} -> {now[name]}' for name in
                   ('batch', 'seed', 'steps', 'lr', 'warmup', 'wd', 'momentum', 'augment', 'local_crops', 'local_captions')
                   if now[name] != saved['options'][name]]
        if changed and self.main:
            print('note: this run does not repeat the one it resumes: ' + ', '.join(changed))

    def save(self):
        """last.pt: tensors and plain values only. Written aside and renamed, so that a kill leaves the old one whole."""
        if not self.main:
            return
        state = {'step': self.step, 'config': dataclasses.asdict(self.config), 'options': dataclasses.asdict(self.options),
                 'merges': self.tokenizer.merges, 'student': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                 'scaler': self.scaler.state_dict()}
        if self.teacher:
            state['teacher'] = self.teacher.model.state_dict()
        partial = self.out / f'last.pt.{os.getpid()}'
        torch.save(state, partial)
        os.replace(partial, self.out / 'last.pt')


def make_tokenizer(vocab, shards, context_length):
    if vocab != 'learn':
        return Tokenizer.clip(None if vocab == 'clip' else vocab, context_length)
    some = range(0, len(shards), max(1, len(shards) // 20000))          # enough to meet every frequent word
    texts = [sentence for i in some for sentence in shards.pool(i)]
    return Tokenizer.learn(texts, 8192, context_length)


# ---------------------------------------------------------------------------------------------------------------------
# 5. One step
# ---------------------------------------------------------------------------------------------------------------------


def train_step(run, batch):
    """Forward, loss, backward, optimizer, teacher. Returns what the log may want to know, as tensors."""
    options, model = run.options, run.model
    for group in run.optimizer.param_groups:
        group['lr'] = lr_at(run.step, options)
    images, texts = batch.to(run.device).views()

    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
        if run.cosmos:
            out = run.student(images, texts)                            # all V + U views
            t_image, t_text = run.teacher(images[:2], [caption[:, :batch.length] for caption in texts[:2]])
        else:
            out, t_image = run.student(images, [caption[:, :batch.length] for caption in texts]), None
    clip = clip_loss(out, model.logit_scale.exp())
    terms = cosmos_terms(out, t_image, t_text, model.distill_logit_scale.exp()) if run.cosmos else torch.zeros(4)
    loss = clip + terms.mean()

    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if options.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), options.clip_grad, norm)
    return dict(out=out, t_image=t_image, loss=loss.detach(), clip=clip.detach(), terms=terms.detach(), norm=norm)


def apply_step(run):
    """The second half, once all ranks know that the numbers are finite."""
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.model.clamp_scales()
    if run.teacher:
        run.teacher.update(run.model, momentum_at(run.step, run.options))
    run.step += 1


def agree(run, *flags):
    """Each flag is true everywhere if it is true on any rank: no rank may stop or go on alone, the others would hang."""
    flags = torch.tensor([float(flag) for flag in flags], device=run.device)
    if run.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# 6. The log line
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def describe(run, state, seconds, waited, steps):
    """One log entry, plain names to plain numbers. Losses are means over ranks, the rest is of rank 0."""
    losses = torch.stack([state['loss'], state['clip'], *state['terms'].to(run.device)])
    if run.world > 1:
        dist.all_reduce(losses)
    loss, clip, *terms = (losses / run.world).tolist()
    image, text = state['out'].image[0], state['out'].text[0]
    entry = {'step': run.step, 'loss': loss, 'clip': clip, 'cosmos': sum(terms) / 4,
             **dict(zip(('h_I_cls', 'h_I_eot', 'h_T_cls', 'h_T_eot'), terms)),
             'chance': math.log(run.options.batch),                     # of every single term: blind guessing among N
             'logit_scale': run.model.logit_scale.exp().item(),
             'lr': lr_at(run.step - 1, run.options), 'grad_norm': state['norm'].item(),
             'accuracy': ((image @ text.T).argmax(dim=1) == torch.arange(len(image), device=run.device)).float().mean().item(),
             'spread': image.std(dim=0).norm().item()}                  # 1: all over the sphere, 0: collapsed to one point
    if run.cosmos:
        entry |= {'distill_logit_scale': run.model.distill_logit_scale.exp().item(),
                  'momentum': momentum_at(run.step - 1, run.options),
                  'teacher_cosine': (image * state['t_image'][0]).sum(dim=-1).mean().item()}
    peak = (torch.cuda.max_memory_allocated() if run.device.type == 'cuda' else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))
    return entry | {'samples_per_s': steps * run.options.batch / seconds, 'data_share': waited / seconds,
                    'memory_GiB': peak / 2 ** 30}


def log_line(entry, total):
    terms = ' '.join(f"{entry[name]:.2f}" for name in ('h_I_cls', 'h_I_eot', 'h_T_cls', 'h_T_eot'))
    line = (f"step {entry['step']}/{total}  loss {entry['loss']:.3f} = clip {entry['clip']:.3f}")
    if 'momentum' in entry:
        line += f" + cosmos {entry['cosmos']:.3f} ({terms})"
    line += (f" chance {entry['chance']:.2f}  acc {entry['accuracy']:.2f}  scale {entry['logit_scale']:.1f}")
    if 'momentum' in entry:
        line += f"/{entry['distill_logit_scale']:.1f}  m {entry['momentum']:.3f}  t-s cos {entry['teacher_cosine']:.2f}"
    return line + (f"  spread {entry['spread']:.2f}  lr {entry['lr']:.1e}  grad {entry['grad_norm']:.2f}  "
                   f"{entry['samples_per_s']:.0f}/s  data {entry['data_share']:.0%}  {entry['memory_GiB']:.1f} GiB")


# ---------------------------------------------------------------------------------------------------------------------
# 7. The loop
# ---------------------------------------------------------------------------------------------------------------------


def announce(run):
    """What this run will do, before it does it."""
    options, views = run.options, run.views
    epochs = options.steps * options.batch / len(run.shards)
    print(f'data       {len(run.shards):,} pairs in {len(run.shards.paths)} shards of {options.data}'
          + (f', {len(run.val):,} held out in {options.val}' if run.val else ', none held out (--val)'))
    print(f'model      {options.preset}, {options.method}, {sum(p.numel() for p in run.model.parameters()):,} parameters, '
          f'vocabulary {run.tokenizer.vocab_size:,} ({options.vocab})')
    print(f'views      {views.globals} global + {views.local_crops} local images, {views.globals} + {views.local_captions} captions, '
          f'augment {options.augment}')
    print(f'run        steps {run.step} to {options.steps} ({epochs:.1f} epochs) of {options.batch} pairs on {run.world} x '
          f'{run.device}, {run.precision}; peak lr {options.lr}, decay {options.wd}, warm-up {options.warmup}')
    if run.teacher and options.momentum < 1:
        half = math.log(0.5) / math.log(options.momentum)
        print(f'teacher    momentum {options.momentum}: half of it is the last {half:.0f} steps, {half * options.batch:,.0f} pairs')
    print(f'out        {options.out}')


def report(run, writer, entry):
    """One entry to the terminal, log.jsonl and, if there is one, TensorBoard."""
    tqdm.write(log_line(entry, run.options.steps))
    with open(run.out / 'log.jsonl', 'a') as file:
        file.write(json.dumps(entry) + '\n')
    if writer:
        for name, value in entry.items():
            writer.add_scalar(name, value, entry['step'])


def tensorboard(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:                                                 # it is welcome, not required
        return None
    return SummaryWriter(out)


def evaluate(run):
    """Figures of the held-out shards, from the teacher where there is one. Rank 0 evaluates, the others wait."""
    figures = {}
    if run.val and run.main:
        network = run.teacher.model if run.teacher else run.model
        figures = evaluation.evaluate(network, run.tokenizer, evaluation.Preprocess(run.config.image_size), run.val)
        run.model.train()
    if run.world > 1:
        dist.barrier()
    return figures


def train(run):
    """Steps until the end or a signal; returns the number of the signal, or 0."""
    options, caught = run.options, []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))
    writer = tensorboard(run.out) if run.main else None
    batches, bad, seen = run.batches(), 0, 0
    start, waited, begun, first = time.perf_counter(), 0.0, run.step, run.step
    for _ in tqdm(range(run.step, options.steps), initial=run.step, total=options.steps, disable=None if run.main else True):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        bad, seen = bad + batch.bad, seen + options.batch // run.world
        if bad > max(0.05 * seen, 10):
            raise ValueError(f'{bad} of {seen} pairs could not be read, over 5 %; the lines above name them')

        state = train_step(run, batch)
        # fp16 gradients may overflow: the scaler skips those steps. A loss never may.
        numbers = [state['loss']] if run.precision == 'fp16' else [state['loss'], state['norm']]
        broken, stop = agree(run, not all(torch.isfinite(x) for x in numbers), bool(caught))
        if broken:
            entry = describe(run, state, time.perf_counter() - start, waited, max(run.step - begun, 1))
            raise ValueError(f'loss or gradient is not finite at step {run.step + 1}: {json.dumps(entry)}; lower --lr or use '
                             f'--precision fp32, and go on from the last checkpoint with --resume auto')
        apply_step(run)

        if run.main and run.step == first + 6:                          # the first steps warm up; these tell
            left = (options.steps - run.step) * (time.perf_counter() - start - warm) / 5
            tqdm.write(f'expected   {left / 60:.1f} minutes for the remaining {options.steps - run.step} steps')
        elif run.step == first + 1:
            warm = time.perf_counter() - start
        if run.step % options.log_every == 0 or run.step in (1, options.steps):
            entry = describe(run, state, time.perf_counter() - start, waited, run.step - begun)
            if run.main:
                report(run, writer, entry | ({'bad': bad} if bad else {}))
            start, waited, begun = time.perf_counter(), 0.0, run.step
        if options.eval_every and run.step % options.eval_every == 0 and run.step < options.steps:
            figures = evaluate(run)
            if run.main and figures:
                tqdm.write(f'step {run.step}, held out: ' + ', '.join(f'{name} {value:.3f}' for name, value in [
                    (name, figures['retrieval'][name]) for name in ('image_to_text_R@1', 'text_to_image_R@1')] + [
                    (role, figures[role]['top1']) for role in ('dominant', 'small') if role in figures]))
                with open(run.out / 'log.jsonl', 'a') as file:
                    file.write(json.dumps({'step': run.step, 'eval': figures}) + '\n')
            start, waited, begun = time.perf_counter(), 0.0, run.step
        if stop or run.step % options.save_every == 0:
            run.save()
        if stop:
            return caught[0] if caught else signal.SIGTERM
    return 0


def finish(run, seconds):
    """Final figures, the attention picture, and where everything lies."""
    figures = evaluate(run)
    if not run.main:
        return
    network = run.teacher.model if run.teacher else run.model
    if run.cosmos:
        shards = run.val or run.shards
        record = shards.record(0)
        captions = [f"a {thing['name']}" for thing in record.get('objects', [])] or shards.pool(0)[:3]
        evaluation.attention_picture(network, run.tokenizer, evaluation.Preprocess(run.config.image_size),
                                     Image.open(io.BytesIO(shards.image(0))), captions, run.out / 'attention.png')
    (run.out / 'eval.json').write_text(json.dumps({'steps': run.step, 'seconds': seconds, **figures}, indent=1))
    print(f"\n{run.step} steps in {seconds / 60:.1f} minutes; held-out figures of the {'teacher' if run.teacher else 'model'}:")
    evaluation.show(figures or {'none': 'no held-out shards (--val)'})
    names = ['last.pt', 'log.jsonl', 'config.json', 'eval.json', 'samples.png'] + ['attention.png'] * run.cosmos
    print(f"all of it in {run.out}: {', '.join(names)}")
    print(f'next       python eval.py retrieval {run.out}/last.pt --shards {run.options.val or "SHARDS"}')


def locate_data(options, main):
    """Fill in --data and --val: the built-in set, drawn if it is absent, or the two halves of a folder like it."""
    if options.data is None:
        options.data = 'runs/scenes'
        if main and not Path(options.data, 'val').is_dir():
            print('drawing the built-in set, once, into runs/scenes')
            make_scenes(options.data)
    halves = [Path(options.data, name) for name in ('train', 'val')]
    if all(half.is_dir() for half in halves):
        options.data, options.val = str(halves[0]), options.val or str(halves[1])


def main():
    options = parse_options()
    rank, world, device = setup(options)
    try:
        locate_data(options, rank == 0)
        if world > 1:
            dist.barrier()
        Path(options.out).mkdir(parents=True, exist_ok=True)
        run = Run(options, rank, world, device)
        if run.main:
            announce(run)
            everything = {**dataclasses.asdict(options), 'config': dataclasses.asdict(run.config)}
            (run.out / 'config.json').write_text(json.dumps(everything, indent=1))
            sample_sheet(run.views, run.out / 'samples.png')
        begun = time.perf_counter()
        stopped = train(run)
        if stopped:
            print(f'{signal.Signals(stopped).name}: saved step {run.step} in {run.out}/last.pt; go on with --resume auto')
            sys.exit(128 + stopped)
        run.save()
        finish(run, time.perf_counter() - begun)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == '__main__':
    cli(main)
