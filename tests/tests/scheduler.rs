//! Answers of a scheduler are those that each job gets alone, bit for bit, on every instruction set; jobs that fail
//! or go away do not disturb the others.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use stb_convert::Recipe;
use stb_format::ModelSpec;
use stb_format::arch::{ExpertsSpec, LayerSet};
use stb_kernels::Isa;
use stb_random::Rng;
use stb_runtime::scheduler::{
    Constraint, Event, Job, Scheduler, SchedulerOptions, SubmitError, Ticket, TokenMask,
};
use stb_runtime::{Engine, Error, Finish, KvKind, OpenOptions, Result, SamplerOptions};
use stb_tests::random_model::{shape, write};

const CONTEXT: usize = 300;

/// A small model with random weights.
fn model(recipe: &str, change: impl Fn(&mut ModelSpec)) -> (tempfile::TempDir, Engine) {
    let mut spec = shape("tiny", None).unwrap();
    spec.context_length = CONTEXT as u64;
    change(&mut spec);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stb");
    let file = std::fs::File::create(&path).unwrap();
    write(&spec, &Recipe::load(recipe).unwrap(), file).unwrap();
    let options = OpenOptions { threads: Some(2), ..OpenOptions::default() };
    (folder, Engine::open(&path, &options).unwrap())
}

fn start(engine: &Arc<Engine>, slots: usize, prefix_cache_bytes: usize) -> Scheduler {
    let tokenizer = Arc::new(engine.model.tokenizer().unwrap());
    let options = SchedulerOptions { slots, context: None, max_queue: 100, prefix_cache_bytes };
    Scheduler::start(Arc::clone(engine), tokenizer, options).unwrap()
}

/// A token with its log probability and those of all tokens, as bits.
type Step = (u32, u32, Vec<(u32, u32)>);

/// What came of a job.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    steps: Vec<Step>,
    text: String,
    finish: Option<Finish>,
    cached: usize,
    error: Option<String>,
}

impl Answer {
    /// Adds an event. Returns whether it is the last one.
    fn add(&mut self, event: Event) -> bool {
        match event {
            Event::Token { token, text, logprob } => {
                self.text.push_str(&text);
                let logprob = logprob.unwrap();
                let top = logprob.top.iter().map(|(token, p)| (*token, p.to_bits())).collect();
                self.steps.push((token, logprob.logprob.to_bits(), top));
                return false;
            }
            Event::Done { finish, text, usage } => {
                self.text.push_str(&text);
                self.finish = Some(finish);
                self.cached = usage.cached_tokens;
                assert_eq!(usage.completion_tokens, self.steps.len());
            }
            Event::Failed(error) => self.error = Some(error.to_string()),
        }
        true
    }
}

/// Submits a job whose events go to `to` with its number. The client goes away after `most` tokens.
fn submit(
    scheduler: &Scheduler,
    job: Job,
    number: usize,
    most: usize,
    to: &Sender<(usize, Event)>,
) -> Ticket {
    let (to, mut count) = (to.clone(), 0);
    let sink = move |event| {
        count += 1;
        let _ = to.send((number, event));
        if count >= most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    scheduler.submit(job, Box::new(sink)).unwrap()
}

fn alone(engine: &Arc<Engine>, job: Job) -> Answer {
    let scheduler = start(engine, 1, 0);
    let (to, from) = channel();
    submit(&scheduler, job, 0, usize::MAX, &to);
    let mut answer = Answer::default();
    while !answer.add(from.recv().unwrap().1) {}
    answer
}

/// Prompts of all lengths that behave differently, several with the same start.
fn jobs() -> Vec<Job> {
    let prompt = |seed: u64, shared: usize, own: usize| {
        let mut rng = Rng(seed);
        let first = (0..shared).map(|i| (i * 11 % 60) as u32 + 2);
        first.chain((0..own).map(|_| rng.below(62) as u32 + 2)).collect::<Vec<u32>>()
    };
    let prompts = [
        (0, 1),
        (0, 15),
        (0, 16),
        (64, 1),
        (128, 0),
        (140, 30),
        (140, 60),
        (64, 9),
        (3, 70),
        (200, 4),
        (0, 40),
        (128, 1),
    ];
    let jobs = prompts.into_iter().enumerate().map(|(i, (shared, own))| {
        let temperature = if i % 3 == 0 { 0.0 } else { 1.0 };
        let sampler = SamplerOptions { seed: i as u64, temperature, ..SamplerOptions::default() };
        let mut job = Job::new(prompt(i as u64, shared, own), sampler);
        job.max_tokens = Some(5 + i * 7 % 20);
        job.logprobs = Some(64);
        job
    });
    jobs.collect()
}

/// Runs all jobs beside each other, begun and canceled at random times.
fn together(engine: &Arc<Engine>, rng: &mut Rng, expected: &[Answer], what: &str) {
    let slots = 1 + rng.below(5);
    // Room for none, few or all pages of the prompts.
    let bytes = [0, 1 << 16, 1 << 24][rng.below(3)];
    let scheduler = start(engine, slots, bytes);
    let (to, from): (_, Receiver<(usize, Event)>) = channel();
    let mut waiting: Vec<(usize, Job)> = jobs().into_iter().enumerate().collect();
    let mut answers = vec![Answer::default(); waiting.len()];
    let mut open: Vec<(usize, Ticket)> = Vec::new();
    let mut gone = vec![false; waiting.len()];
    while !waiting.is_empty() || !open.is_empty() {
        if !waiting.is_empty() && (open.is_empty() || rng.below(3) == 0) {
            let (number, job) = waiting.swap_remove(rng.below(waiting.len()));
            let most = if rng.below(6) == 0 { 1 + rng.below(6) } else { usize::MAX };
            gone[number] = most != usize::MAX;
            let ticket = submit(&scheduler, job, number, most, &to);
            if !gone[number] {
                open.push((number, ticket));
            }
            continue;
        }
        if rng.below(60) == 0 {
            let (number, ticket) = open.swap_remove(rng.below(open.len()));
            gone[number] = true;
            scheduler.cancel(ticket);
            continue;
        }
        let (number, event) = from.recv().unwrap();
        if answers[number].add(event) {
            open.retain(|(open, _)| *open != number);
        }
    }
    scheduler.drain();
    while let Ok((number, event)) = from.try_recv() {
        answers[number].add(event);
    }
    for (number, (answer, expected)) in answers.iter().zip(expected).enumerate() {
        let what = format!("{what}, job {number}, {slots} slots, {bytes} bytes");
        // Draining refuses those that still waited.
        assert!(answer.error.is_none() || gone[number], "{what}: {answer:?}");
        if gone[number] && answer.finish.is_none() {
            assert!(expected.steps.starts_with(&answer.steps), "{what}");
        } else {
            assert_eq!(answer.steps, expected.steps, "{what}");
            assert_eq!((answer.finish, &answer.text), (expected.finish, &expected.text), "{what}");
        }
    }
    let statistics = scheduler.statistics();
    assert_eq!(
        (statistics.busy, statistics.queued, statistics.sequence_bytes),
        (0, 0, 0),
        "{what}"
    );
    assert!(statistics.prefix_bytes <= bytes, "{what}: {statistics:?}");
}

fn same_together_as_alone(mut engine: Engine, name: &str) {
    let mut rng = Rng(name.len() as u64);
    let mut expected: Option<Vec<Answer>> = None;
    for isa in Isa::available() {
        engine.isa = isa;
        let shared = Arc::new(engine);
        let what = format!("{name} on {}", isa.name());
        let answers: Vec<Answer> = jobs().into_iter().map(|job| alone(&shared, job)).collect();
        assert!(answers.iter().any(|answer| answer.steps.len() > 10), "{what}: {answers:?}");
        let expected = expected.get_or_insert_with(|| answers.clone());
        assert!(*expected == answers, "{what}: other bits than on the best set");
        for _ in 0..3 {
            together(&shared, &mut rng, expected, &what);
        }
        // The threads of the schedulers have ended.
        engine = Arc::into_inner(shared).unwrap();
    }
}

#[test]
fn answers_do_not_depend_on_other_jobs_for_any_encoding() {
    for recipe in ["int4", "int3", "int8", "nm-1of4", "nm-2of8", "stbllm-6of8", "sign", "source"] {
        let (_folder, engine) = model(recipe, |_| {});
        same_together_as_alone(engine, recipe);
    }
}

#[test]
fn answers_do_not_depend_on_other_jobs_for_any_cache_and_precision() {
    for kv in [KvKind::F32, KvKind::Q8] {
        let (_folder, mut engine) = model("int4", |_| {});
        engine.kv = kv;
        engine.exact = kv == KvKind::F32;
        same_together_as_alone(engine, &format!("{kv:?}"));
    }
}

#[test]
fn answers_do_not_depend_on_other_jobs_for_any_architecture() {
    let (_folder, engine) = model("int4", |spec| {
        spec.experts = Some(ExpertsSpec {
            count: 4,
            active: 2,
            intermediate_size: 64,
            normalize: true,
            layers: LayerSet::All,
        });
    });
    same_together_as_alone(engine, "experts");
    let (_folder, engine) = model("int3", |spec| {
        spec.window = Some(stb_format::arch::Window { size: 40, layers: LayerSet::All });
        spec.attention_soft_cap = Some(20.0);
        spec.logit_soft_cap = Some(30.0);
    });
    same_together_as_alone(engine, "window");
    let (_folder, engine) = model("nm-1of8", |spec| spec.learned_positions = true);
    same_together_as_alone(engine, "positions");
}

/// A long start that prompts share is computed once.
#[test]
fn prompts_share_their_start() {
    let (_folder, engine) = model("int4", |_| {});
    let engine = Arc::new(engine);
    let scheduler = start(&engine, 4, 1 << 24);
    let (to, from) = channel();
    let mut cached = Vec::new();
    for end in 0..3 {
        let prompt = (0..200).map(|i| i % 60).chain([end]).collect();
        let mut job = Job::new(prompt, SamplerOptions::default());
        job.max_tokens = Some(1);
        job.logprobs = Some(0);
        submit(&scheduler, job, 0, usize::MAX, &to);
        let mut answer = Answer::default();
        while !answer.add(from.recv().unwrap().1) {}
        cached.push(answer.cached);
    }
    assert_eq!(cached, [0, 192, 192]);
    scheduler.drain();
    let statistics = scheduler.statistics();
    assert_eq!((statistics.prefix_hits, statistics.prefix_misses), (2, 1));
    assert_eq!((statistics.prefilled_tokens, statistics.cached_tokens), (201 + 2 * 9, 2 * 192));
    assert_eq!((statistics.completed, statistics.decoded_tokens), (3, 3));
    let page = 64 * 2 * 2 * 2 * 24 * 2;
    assert_eq!(statistics.prefix_bytes % page, 0);
    assert!(statistics.prefix_bytes >= 3 * page);
}

/// Counts up, and fails or panics on request.
struct Counting {
    next: u32,
    end: u32,
    broken: Option<fn() -> Result<()>>,
}

impl Constraint for Counting {
    fn mask(&mut self, allowed: &mut TokenMask) -> Result<()> {
        if let Some(broken) = self.broken
            && self.next == 8
        {
            broken()?;
        }
        allowed.forbid_all();
        allowed.set(self.next, self.next < self.end);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        assert_eq!(token, self.next);
        self.next += 1;
        Ok(())
    }

    fn may_end(&self) -> bool {
        self.next >= 10
    }
}

#[test]
fn constraints_choose_and_their_failures_stay_alone() {
    let (_folder, engine) = model("int4", |_| {});
    let engine = Arc::new(engine);
    let scheduler = start(&engine, 4, 0);
    let (to, from) = channel();
    let job = |end, broken| {
        let mut job = Job::new(vec![3, 4], SamplerOptions::default());
        job.logprobs = Some(1);
        job.constraint = Some(Box::new(Counting { next: 5, end, broken }));
        job
    };
    let fails: fn() -> Result<()> = || Err(Error::invalid("no more"));
    let panics: fn() -> Result<()> = || panic!("a broken grammar");
    let cases = [(12, None), (9, None), (12, Some(fails)), (12, Some(panics)), (12, None)];
    for (number, (end, broken)) in cases.into_iter().enumerate() {
        submit(&scheduler, job(end, broken), number, usize::MAX, &to);
    }
    let mut answers = vec![Answer::default(); cases.len()];
    let mut open = cases.len();
    while open > 0 {
        let (number, event) = from.recv().unwrap();
        open -= usize::from(answers[number].add(event));
    }
    for number in [0, 4] {
        let tokens: Vec<u32> = answers[number].steps.iter().map(|step| step.0).collect();
        assert_eq!(tokens, [5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(answers[number].finish, Some(Finish::Stop));
    }
    let errors: Vec<&str> = answers[1..4].iter().map(|a| a.error.as_deref().unwrap()).collect();
    assert!(errors[0].contains("grammar") && errors[1] == "no more", "{errors:?}");
    assert!(errors[2].contains("a broken grammar"), "{errors:?}");
    assert_eq!(scheduler.statistics().slots, 4);
}

#[test]
fn sinks_that_panic_do_not_disturb_the_others() {
    let (_folder, engine) = model("nm-1of4", |_| {});
    let engine = Arc::new(engine);
    let scheduler = start(&engine, 2, 0);
    let job = || {
        let mut job = Job::new(vec![3, 4], SamplerOptions::default());
        (job.max_tokens, job.logprobs) = (Some(5), Some(0));
        job
    };
    scheduler.submit(job(), Box::new(|_| panic!("a client's bug"))).unwrap();
    let (to, from) = channel();
    submit(&scheduler, job(), 0, usize::MAX, &to);
    let mut answer = Answer::default();
    while !answer.add(from.recv().unwrap().1) {}
    assert_eq!(answer.finish, Some(Finish::Length));
}

#[test]
fn wrong_jobs_and_full_queues_are_refused() {
    let (_folder, engine) = model("nm-1of4", |_| {});
    let tokenizer = Arc::new(engine.model.tokenizer().unwrap());
    let engine = Arc::new(engine);
    let options =
        |slots, context| SchedulerOptions { slots, context, max_queue: 2, prefix_cache_bytes: 0 };
    let start = |options| Scheduler::start(Arc::clone(&engine), Arc::clone(&tokenizer), options);
    assert!(start(options(0, None)).is_err() && start(options(1, Some(1))).is_err());
    let scheduler = start(options(1, Some(20))).unwrap();
    let try_submit = |prompt: Vec<u32>, sink| {
        scheduler.submit(Job::new(prompt, SamplerOptions::default()), sink)
    };
    for prompt in [vec![], vec![1; 20], vec![64]] {
        let refused = try_submit(prompt, Box::new(|_| ControlFlow::Continue(())));
        assert!(matches!(refused, Err(SubmitError::Invalid(Error::Usage { .. }))));
    }
    // The only slot waits in the sink of the first job.
    let (enter, entered) = channel();
    let (leave, left) = channel::<()>();
    let first = try_submit(
        vec![1],
        Box::new(move |_| {
            let _ = enter.send(());
            let _ = left.recv();
            ControlFlow::Continue(())
        }),
    );
    assert_eq!(first.unwrap(), Ticket { id: 1 });
    entered.recv().unwrap();
    let (to, from) = channel();
    let events = || {
        let to = to.clone();
        Box::new(move |event| {
            let _ = to.send(event);
            ControlFlow::Continue(())
        })
    };
    let second = try_submit(vec![1], events()).unwrap();
    try_submit(vec![1], events()).unwrap();
    assert!(matches!(try_submit(vec![1], events()), Err(SubmitError::Busy)));
    scheduler.cancel(second);
    assert_eq!(scheduler.statistics().queued, 1);
    // Draining finishes the first job and refuses the waiting one.
    std::thread::scope(|scope| {
        scope.spawn(|| scheduler.drain());
        while !matches!(try_submit(vec![1], events()), Err(SubmitError::Closed)) {
            std::thread::yield_now();
        }
        drop(leave);
    });
    let events: Vec<Event> = from.try_iter().collect();
    assert!(!events.is_empty() && events.iter().all(|event| matches!(event, Event::Failed(_))));
    assert_eq!(scheduler.statistics().completed, 1);
}

/// A job that was accepted before the end of the server is answered if a slot is free, even if no pass has begun.
#[test]
fn draining_answers_what_has_a_slot() {
    let (_folder, engine) = model("int4", |_| {});
    let engine = Arc::new(engine);
    for _ in 0..20 {
        let scheduler = start(&engine, 2, 0);
        let (to, from) = channel();
        let mut job = Job::new(vec![1], SamplerOptions::default());
        job.max_tokens = Some(2);
        job.logprobs = Some(0);
        submit(&scheduler, job, 0, usize::MAX, &to);
        scheduler.drain();
        let mut answer = Answer::default();
        for (_, event) in from.try_iter() {
            answer.add(event);
        }
        assert_eq!((answer.error, answer.steps.len()), (None, 2));
    }
}

/// An embedding has the same bits beside answers as alone.
#[test]
fn embeddings_do_not_depend_on_other_jobs() {
    let (_folder, engine) = model("int4", |_| {});
    let engine = Arc::new(engine);
    let embed = |scheduler: &Scheduler, tokens: Vec<u32>| {
        let (to, from) = channel();
        let sink = Box::new(move |embedding: Result<Vec<f32>>| {
            let _ = to.send(embedding.unwrap());
        });
        scheduler.embed(tokens, sink).unwrap();
        from
    };
    let texts: [Vec<u32>; 3] = [vec![5], (0..100).map(|i| i % 64).collect(), vec![7; CONTEXT]];
    let alone: Vec<Vec<f32>> = texts
        .iter()
        .map(|text| embed(&start(&engine, 1, 0), text.clone()).recv().unwrap())
        .collect();
    assert_eq!(alone[0].len(), engine.model.hidden_size());
    let scheduler = start(&engine, 6, 1 << 20);
    let (to, _from) = channel();
    for job in jobs().into_iter().take(3) {
        submit(&scheduler, job, 0, 100, &to);
    }
    let together: Vec<_> = texts.iter().map(|text| embed(&scheduler, text.clone())).collect();
    for job in jobs().into_iter().skip(3) {
        submit(&scheduler, job, 0, 100, &to);
    }
    for (found, alone) in together.iter().zip(&alone) {
        assert_eq!(found.recv().unwrap(), *alone);
    }
    assert!(scheduler.embed(vec![1; CONTEXT + 1], Box::new(|_| {})).is_err());
}
