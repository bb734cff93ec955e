//! A training step whose pass is recorded once and replayed.

use std::collections::BTreeMap;
use std::iter::once;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::config::TrainConfig;
use super::gradients::{give_gradient, loss_and_hits, take_gradients};
use super::optimizer::zero_grad;
use super::run::Run;
use crate::backbone::Backbone;
use crate::error::{Error, Result};
use crate::eval::{Inputs, Team};
use crate::ffi::autocast::Autocast;
use crate::ffi::{CudaGraph, Recording};
use crate::model::PetlModel;

/// Passes before the recording. They set up what libtorch sets up once: handles, workspaces, plans.
const WARM_UPS: usize = 3;

/// Replays that are compared with a pass without the graph. The learning rate of the first step may
/// be 0, so the third replay is the first one that surely follows a change of the weights.
const COMPARED: usize = 3;

/// A pass over the same tensors each time it is called: it reads a batch, writes its loss and hits,
/// and leaves gradients.
pub(super) type Pass<'a> = Rc<dyn Fn() -> Result<()> + 'a>;

/// Records the operators of a pass and runs them again.
pub(super) trait StepGraph<'a> {
    /// Runs `pass` where it will be recorded.
    fn warm_up(&mut self, pass: &Pass<'a>) -> Result<()>;

    /// Records `pass`. The values of the tensors that it writes are undefined until a replay.
    fn capture(&mut self, pass: &Pass<'a>) -> Result<()>;

    /// Runs what was recorded. It reads and writes the tensors of the recording, so gradients are
    /// overwritten, where a pass adds to them.
    fn replay(&mut self) -> Result<()>;
}

/// Makes the graph of a run.
pub(super) trait Graphs {
    /// Checks that a model on `device` can be captured.
    ///
    /// # Errors
    /// [`Error::Config`] with the reason.
    fn check(&self, device: Device) -> Result<()>;

    fn open<'a>(&self, device: Device) -> Result<Box<dyn StepGraph<'a> + 'a>>;
}

/// The graphs of CUDA.
#[derive(Debug)]
pub(super) struct CudaGraphs;

impl Graphs for CudaGraphs {
    fn check(&self, device: Device) -> Result<()> {
        gpu(device)?;
        match CudaGraph::lacks() {
            Some(reason) => Err(refused("false where libtorch has no CUDA graphs", reason)),
            None => Ok(()),
        }
    }

    fn open<'a>(&self, device: Device) -> Result<Box<dyn StepGraph<'a> + 'a>> {
        Ok(Box::new(CudaGraph::new(gpu(device)?)?))
    }
}

impl<'a> StepGraph<'a> for CudaGraph {
    fn warm_up(&mut self, pass: &Pass<'a>) -> Result<()> {
        self.aside(|| pass())
    }

    fn capture(&mut self, pass: &Pass<'a>) -> Result<()> {
        CudaGraph::capture(self, || pass())
    }

    fn replay(&mut self) -> Result<()> {
        CudaGraph::replay(self)
    }
}

/// Returns the number of a GPU.
fn gpu(device: Device) -> Result<usize> {
    match device {
        Device::Cuda(gpu) => Ok(gpu),
        other => {
            let reason = cuda_is_missing();
            let found = format!("a model on {other:?}{reason}");
            Err(refused("false for a model that is not on a CUDA device", found))
        }
    }
}

/// Returns why there is no CUDA device, as the end of a sentence, if that is so.
fn cuda_is_missing() -> String {
    CudaGraph::lacks().map_or_else(String::new, |reason| format!(" ({reason})"))
}

fn refused(expected: &str, found: impl ToString) -> Error {
    Error::config("cuda_graph", expected, found).in_config("TrainConfig")
}

/// Checks that the step of a run can be captured, apart from draws of the method, which the first
/// pass finds.
///
/// # Errors
/// [`Error::Config`] with the field that stands in the way.
pub(super) fn check_captured<B: Backbone>(
    model: &PetlModel<B>,
    config: &TrainConfig,
    team: Team,
    graphs: &dyn Graphs,
) -> Result<()> {
    let in_the_way = |field: &str, expected: &str, found: String| {
        let expected = format!("{expected} with cuda_graph");
        Err(Error::config(field, expected, found).in_config("TrainConfig"))
    };
    if !team.is_alone() {
        return Err(refused("false in a run of several processes", team.size()));
    }
    if config.accumulate != 1 {
        return in_the_way("accumulate", "1", config.accumulate.to_string());
    }
    if let Some(size) = config.micro_batch_size {
        return in_the_way("micro_batch_size", "none", size.to_string());
    }
    if config.recompute {
        return in_the_way("recompute", "false", true.to_string());
    }
    let drop_path = model.config().drop_path;
    if drop_path != 0.0 {
        let expected = "0 with cuda_graph, whose replays draw nothing";
        return Err(Error::config("drop_path", expected, drop_path).in_config("PetlConfig"));
    }
    graphs.check(model.var_store().device())
}

/// The graph of a run, and its step once it is recorded.
pub(super) struct Captured<'a> {
    graph: Box<dyn StepGraph<'a> + 'a>,
    step: Option<Recorded<'a>>,
}

/// The tensors that each replay of a step reads and writes.
struct Recorded<'a> {
    batch: Tensor,
    labels: Tensor,
    /// `[2]`: the loss and the number of hits.
    values: Tensor,
    /// The variables that get a gradient.
    outputs: Vec<Output>,
    /// The pass that was recorded. It also keeps alive what the graph reads.
    pass: Pass<'a>,
    /// The number of replays that will be compared.
    to_compare: usize,
    /// The largest relative difference that rounding explains.
    limit: f64,
}

struct Output {
    name: String,
    variable: Tensor,
    gradient: Tensor,
}

impl<'a, B: Backbone> Run<'a, B> {
    /// Opens the graph of a run that is captured.
    pub(super) fn captured<'i>(&self) -> Result<Option<Captured<'i>>> {
        if !self.config.cuda_graph {
            return Ok(None);
        }
        let graph = self.graphs.open(self.model.var_store().device())?;
        Ok(Some(Captured { graph, step: None }))
    }

    /// Leaves the gradients of the next batch, by a replay of the step, which the first batch
    /// records. Returns the loss and the number of hits, `[2]`.
    pub(super) fn replayed<'i>(
        &self,
        inputs: &'i Inputs<'i>,
        batches: &mut dyn Iterator<Item = Result<(Tensor, Tensor)>>,
        captured: &mut Captured<'i>,
    ) -> Result<Tensor>
    where
        'a: 'i,
    {
        let Some(batch) = batches.next() else {
            return Err(refused("false where a step may have no batch", true));
        };
        let (batch, labels) = batch?;
        let Captured { graph, step } = captured;
        let step = match step {
            Some(step) => step,
            empty => empty.insert(self.record(inputs, (&batch, &labels), graph.as_mut())?),
        };
        step.run(graph.as_mut(), (&batch, &labels))
    }

    fn record<'i>(
        &self,
        inputs: &'i Inputs<'i>,
        (batch, labels): (&Tensor, &Tensor),
        graph: &mut dyn StepGraph<'i>,
    ) -> Result<Recorded<'i>>
    where
        'a: 'i,
    {
        let (batch, labels) = (batch.f_detach_copy()?, labels.f_detach_copy()?);
        let values = Tensor::f_zeros([2], (Kind::Float, batch.device()))?;
        let pass = self.pass_over(inputs, [&batch, &labels, &values]);
        let before = take_gradients(self.variables.values())?;
        for _ in 0..WARM_UPS {
            graph.warm_up(&pass)?;
        }
        // A gradient that exists would be added to in each replay.
        let _warm = take_gradients(self.variables.values())?;
        graph.capture(&pass)?;
        let outputs = outputs(&self.variables)?;
        // Other variables that had a gradient before have one of zero from here on, which the
        // replays leave alone.
        before.into_iter().try_for_each(give_gradient)?;
        let limit = self.limit()?;
        Ok(Recorded { batch, labels, values, outputs, pass, to_compare: COMPARED, limit })
    }

    /// Returns the pass over `batch` and `labels` that writes its loss and hits into `values`.
    fn pass_over<'i>(
        &self,
        inputs: &'i Inputs<'i>,
        [batch, labels, values]: [&Tensor; 3],
    ) -> Pass<'i>
    where
        'a: 'i,
    {
        let [batch, labels, values] = [batch, labels, values].map(Tensor::shallow_clone);
        let (model, loss) = (self.model, Rc::clone(&self.loss));
        Rc::new(move || {
            let _recording = Recording::enter();
            let mean = |logits: &Tensor| loss.mean(logits, &labels);
            let found = loss_and_hits(model, inputs, (&batch, &labels), false, &mean)?;
            tch::no_grad(|| values.shallow_clone().f_copy_(&found))?;
            Ok(())
        })
    }

    /// Returns the largest difference between two passes in the dtype of the run that rounding
    /// explains.
    fn limit(&self) -> Result<f64> {
        let backbone = self.model.backbone();
        let is_f32 = backbone.compute_kind() == Kind::Float
            && Autocast::kind(self.model.var_store().device())?.is_none();
        Ok(if is_f32 { 1e-3 } else { 5e-2 })
    }
}

/// Returns the variables that have a gradient.
fn outputs(variables: &BTreeMap<String, Tensor>) -> Result<Vec<Output>> {
    let mut outputs = Vec::new();
    for (name, variable) in variables {
        let gradient = variable.f_grad()?;
        if gradient.defined() {
            let (name, variable) = (name.clone(), variable.shallow_clone());
            outputs.push(Output { name, variable, gradient });
        }
    }
    Ok(outputs)
}

impl<'a> Recorded<'a> {
    fn run(&mut self, graph: &mut dyn StepGraph<'a>, batch: (&Tensor, &Tensor)) -> Result<Tensor> {
        self.check_gradients()?;
        fill(&self.batch, batch.0)?;
        fill(&self.labels, batch.1)?;
        graph.replay()?;
        if self.to_compare > 0 {
            self.to_compare -= 1;
            self.compare()?;
        }
        // The next replay writes into `values`.
        Ok(self.values.f_detach_copy()?)
    }

    /// Checks that the variables still have the gradients that the replays write to.
    fn check_gradients(&self) -> Result<()> {
        for Output { name, variable, gradient } in &self.outputs {
            let found = variable.f_grad()?;
            if !found.defined() || found.data_ptr() != gradient.data_ptr() {
                return Err(Error::Input {
                    argument: "optimizer",
                    expected: "one that leaves the gradients in place, which the replays with \
                               cuda_graph write to"
                        .to_owned(),
                    found: format!("another gradient of {name}"),
                });
            }
        }
        Ok(())
    }

    /// Compares what a replay has written with a pass without the graph, and leaves the results of
    /// the replay.
    fn compare(&self) -> Result<()> {
        let written: Vec<Tensor> = self.written().map(Tensor::shallow_clone).collect();
        let copies = written.iter().map(Tensor::f_detach_copy);
        let replayed: Vec<Tensor> = copies.collect::<Result<_, _>>()?;
        zero_grad(self.outputs.iter().map(|output| &output.variable))?;
        (self.pass)()?;
        tch::no_grad(|| self.check_difference(&replayed))?;
        for (mut written, replayed) in written.into_iter().zip(&replayed) {
            tch::no_grad(|| written.f_copy_(replayed))?;
        }
        Ok(())
    }

    /// The tensors that a replay writes.
    fn written(&self) -> impl Iterator<Item = &Tensor> {
        once(&self.values).chain(self.outputs.iter().map(|output| &output.gradient))
    }

    /// Returns an error if the loss or a gradient of `replayed` is not what the pass before has
    /// written.
    fn check_difference(&self, replayed: &[Tensor]) -> Result<()> {
        let norm = |tensor: &Tensor| tensor.f_norm()?.f_to_kind(Kind::Double);
        // The loss alone of the values: of two equal logits either may be the highest.
        let loss = (self.values.f_narrow(0, 0, 1)?, replayed[0].f_narrow(0, 0, 1)?);
        let mut norms = vec![norm(&loss.1.f_sub(&loss.0)?)?, norm(&loss.0)?];
        for (Output { gradient, .. }, found) in self.outputs.iter().zip(&replayed[1..]) {
            norms.extend([norm(&found.f_sub(gradient)?)?, norm(gradient)?]);
        }
        let norms = Vec::<f64>::try_from(Tensor::f_stack(&norms, 0)?.f_to_device(Device::Cpu)?)?;
        let Some((index, difference)) = first_difference(&norms, self.limit) else {
            return Ok(());
        };
        let what = match index.checked_sub(1) {
            None => "loss".to_owned(),
            Some(index) => format!("gradient of {}", self.outputs[index].name),
        };
        Err(Error::CaptureDiffers { what, difference, limit: self.limit })
    }
}

/// Returns the first value whose difference is more than `limit` of its size, and the relative
/// difference. `norms` has the norm of the difference and that of the value, for the loss and then
/// for each gradient.
///
/// A gradient that is small beside all of them together may be nothing but rounding, so its size is
/// at least a hundredth of their joint norm. If a value is not finite, the run diverges, and the
/// loop reports that.
fn first_difference(norms: &[f64], limit: f64) -> Option<(usize, f64)> {
    let pairs = || norms.chunks_exact(2);
    let joint = pairs().skip(1).map(|pair| pair[1] * pair[1]).sum::<f64>().sqrt();
    if pairs().any(|pair| !pair[1].is_finite()) {
        return None;
    }
    pairs().enumerate().find_map(|(index, pair)| {
        let size = pair[1].max(1e-2 * if index == 0 { 1.0 } else { joint });
        let is_close = pair[0] <= limit * size;
        (!is_close).then(|| (index, pair[0] / size))
    })
}

/// Copies `value` into `target`, which has the same shape and dtype in each step.
fn fill(target: &Tensor, value: &Tensor) -> Result<()> {
    if target.size() != value.size() || target.kind() != value.kind() {
        let shape = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
        let expected = format!("false where a batch is not {}", shape(target));
        return Err(refused(&expected, shape(value)));
    }
    tch::no_grad(|| target.shallow_clone().f_copy_(value))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::ops::ControlFlow;

    use ndarray::Array4;

    use super::super::fit::fit_by;
    use super::*;
    use crate::backbone::{FrozenViT, ViTConfig};
    use crate::data::{Augment, ImageDataset, Normalization};
    use crate::eval::PrefixCache;
    use crate::ffi::clear_gradient;
    use crate::model::PetlConfig;
    use crate::petl::{
        ConvBypassConfig, ConvBypassVariant, FactConfig, LoraConfig, LowBitConfig, Method,
        SsfConfig, VptConfig,
    };
    use crate::train::{
        ClassWeights, CosineSchedule, Fit, FitOptions, Observer, Optimizer, RunCheckpoint,
        Selection, Silent, StepReport, Stepped, fit_with,
    };

    /// What goes wrong in a stand-in, and from which replay on.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fault {
        None,
        /// Nothing is computed.
        Stale(usize),
        /// One gradient is 1 % too large.
        Gradient(usize),
        Capture,
    }

    /// Stand-ins for the graphs of a GPU over the variables of a model.
    struct StandIns {
        variables: BTreeMap<String, Tensor>,
        fault: Fault,
        captures: Cell<usize>,
        replays: Rc<Cell<usize>>,
    }

    impl StandIns {
        fn of(model: &PetlModel, fault: Fault) -> Self {
            let variables = model.var_store().variables().into_iter().collect();
            StandIns { variables, fault, captures: Cell::new(0), replays: Rc::default() }
        }
    }

    impl Graphs for StandIns {
        fn check(&self, _device: Device) -> Result<()> {
            Ok(())
        }

        fn open<'a>(&self, _device: Device) -> Result<Box<dyn StepGraph<'a> + 'a>> {
            self.captures.set(self.captures.get() + 1);
            let variables =
                self.variables.iter().map(|(name, v)| (name.clone(), v.shallow_clone())).collect();
            let (fault, replays) = (self.fault, Rc::clone(&self.replays));
            Ok(Box::new(StandIn { variables, fault, replays, pass: None, gradients: Vec::new() }))
        }
    }

    /// Keeps the pass and runs it again in each replay. As in a graph, a replay overwrites the
    /// gradients in place, and a recording leaves no values.
    struct StandIn<'a> {
        variables: BTreeMap<String, Tensor>,
        fault: Fault,
        replays: Rc<Cell<usize>>,
        pass: Option<Pass<'a>>,
        gradients: Vec<Tensor>,
    }

    impl<'a> StepGraph<'a> for StandIn<'a> {
        fn warm_up(&mut self, pass: &Pass<'a>) -> Result<()> {
            pass()
        }

        fn capture(&mut self, pass: &Pass<'a>) -> Result<()> {
            if self.fault == Fault::Capture {
                return Err(tch::TchError::Torch("not permitted when capturing".into()).into());
            }
            assert!(self.variables.values().all(|variable| !variable.grad().defined()));
            pass()?;
            for variable in self.variables.values().filter(|v| v.grad().defined()) {
                let _nothing = variable.grad().f_fill_(f64::NAN)?;
                self.gradients.push(variable.grad());
            }
            self.pass = Some(Rc::clone(pass));
            Ok(())
        }

        fn replay(&mut self) -> Result<()> {
            self.replays.set(self.replays.get() + 1);
            let replay = self.replays.get();
            if matches!(self.fault, Fault::Stale(from) if replay >= from) {
                return Ok(());
            }
            for gradient in &mut self.gradients {
                let _zeroed = gradient.f_zero_()?;
            }
            (self.pass.as_ref().expect("a captured pass"))()?;
            if matches!(self.fault, Fault::Gradient(from) if replay >= from) {
                let _wrong = self.variables["head.bias"].grad().f_mul_scalar_(1.01)?;
            }
            Ok(())
        }
    }

    /// The CPU, or the device of `tests/accelerator` in a process that is asked for it.
    fn device() -> Device {
        #[cfg(target_os = "linux")]
        if std::env::var_os("CONVPASS_TEST_DEVICE").is_some_and(|name| name == "accelerator") {
            static DEVICE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
            let hold = || convpass_accelerator::Accelerator::hold().device();
            return *DEVICE.get_or_init(hold);
        }
        Device::Cpu
    }

    fn backbone() -> FrozenViT {
        let config = ViTConfig {
            image_size: (16, 16),
            patch_size: 4,
            embed_dim: 32,
            depth: 2,
            num_heads: 2,
            mlp_dim: 64,
            ..ViTConfig::default()
        };
        FrozenViT::random(&config, 3, device()).unwrap()
    }

    fn model_on(backbone: FrozenViT, method: Method) -> PetlModel {
        let config = PetlConfig { seed: 5, drop_path: 0.0, ..PetlConfig::new(method, 3) };
        PetlModel::new(backbone, &config).unwrap()
    }

    fn bypass(dropout: f64) -> Method {
        Method::ConvBypass(ConvBypassConfig { dropout, ..Default::default() })
    }

    fn images(count: usize, salt: usize) -> ImageDataset {
        let images = Array4::from_shape_fn((count, 16, 16, 3), |(n, row, column, channel)| {
            let lit = column * 3 / 16 == n % 3;
            let noise = ((n * 31 + row * 17 + column * 7 + channel * 3 + salt * 5) % 96) as u8;
            if lit { 120 + noise } else { noise }
        });
        let labels = (0..count).map(|n| (n % 3) as i64).collect();
        ImageDataset::from_arrays(images, labels, 3).unwrap()
    }

    /// Three epochs of three steps: the last two of 14 images are dropped.
    fn config() -> TrainConfig {
        TrainConfig {
            epochs: 3,
            batch_size: 4,
            max_grad_norm: Some(0.3),
            schedule: CosineSchedule {
                lr: 1e-2,
                warmup_epochs: 1,
                stepped: Stepped::EachStep,
                ..CosineSchedule::default()
            },
            normalization: Normalization::Half,
            seed: 9,
            selection: Selection::BestOnValidation,
            cuda_graph: true,
            ..TrainConfig::default()
        }
    }

    fn weights(model: &PetlModel) -> BTreeMap<String, Tensor> {
        let copy = |(name, weight): (String, Tensor)| {
            (name, weight.detach().to_device_(Device::Cpu, Kind::Float, false, true))
        };
        model.var_store().variables().into_iter().map(copy).collect()
    }

    /// What a run reports, but for its times.
    fn reports(fit: &Fit) -> String {
        let epochs = fit.epochs.iter().map(|e| (e.epoch, e.lr, e.loss, e.accuracy, e.val_top1));
        format!("{:?} {:?}", epochs.collect::<Vec<_>>(), fit.selected_epoch)
    }

    fn run(
        model: &mut PetlModel,
        config: &TrainConfig,
        options: FitOptions,
        observer: &mut dyn Observer,
        graphs: &StandIns,
    ) -> Result<Fit> {
        let (train, val) = (images(14, 0), images(7, 1));
        fit_by(model, &train, Some(&val), config, options, observer, graphs)
    }

    fn assert_alike(build: &dyn Fn() -> PetlModel, config: &TrainConfig) {
        let (train, val) = (images(14, 0), images(7, 1));
        let mut plain = build();
        let without = TrainConfig { cuda_graph: false, ..config.clone() };
        let options = FitOptions::default();
        let expected =
            fit_with(&mut plain, &train, Some(&val), &without, options, &mut Silent).unwrap();
        let mut captured = build();
        let graphs = StandIns::of(&captured, Fault::None);
        let found = run(&mut captured, config, FitOptions::default(), &mut Silent, &graphs);
        let name = captured.config().method.name().to_owned();
        assert_eq!(reports(&found.unwrap()), reports(&expected), "{name}");
        assert_eq!(weights(&captured), weights(&plain), "{name}");
        assert_ne!(weights(&captured), weights(&build()), "{name}: nothing was learnt");
        assert_eq!((graphs.captures.get(), graphs.replays.get()), (1, 9), "{name}");
    }

    #[test]
    fn replays_train_the_weights_of_the_run_without_them() {
        let methods = [
            bypass(0.0),
            Method::LinearProbe,
            Method::Full,
            Method::Lora(LoraConfig::default()),
            Method::Fact(FactConfig { dropout: 0.0, ..Default::default() }),
            Method::Vpt(VptConfig { dropout: 0.0, ..Default::default() }),
            Method::Ssf(SsfConfig::default()),
        ];
        for method in methods {
            assert_alike(&|| model_on(backbone(), method.clone()), &config());
        }
    }

    #[test]
    fn replays_follow_every_setting_of_a_run() {
        let with = |change: fn(&mut TrainConfig)| {
            let mut config = config();
            change(&mut config);
            assert_alike(&|| model_on(backbone(), bypass(0.0)), &config);
        };
        with(|config| config.max_grad_norm = None);
        with(|config| config.class_weights = ClassWeights::Given(vec![1.0, 0.5, 2.0]));
        with(|config| {
            config.class_weights = ClassWeights::Balanced;
            config.label_smoothing = 0.1;
        });
        with(|config| config.head_lr_factor = 0.0);
        with(|config| config.augment = Some(Augment::default()));
        // The second block alone has a bypass, so the output of the first one is kept.
        let config =
            TrainConfig { prefix: Some(PrefixCache { folder: None, bf16: false }), ..config() };
        let bypass = ConvBypassConfig { dropout: 0.0, ..Default::default() };
        let method = ConvBypassVariant { blocks: Some(vec![0, 8]), ..bypass.into() };
        let method = Method::ConvBypassVariant(method);
        assert_alike(&|| model_on(backbone(), method.clone()), &config);
    }

    #[test]
    fn a_backbone_in_bf16_is_captured_with_the_casts_of_the_weights() {
        let backbone = backbone().to_kind(Kind::BFloat16).unwrap();
        for method in [bypass(0.0), Method::Full] {
            assert_alike(&|| model_on(backbone.clone(), method.clone()), &config());
        }
    }

    /// Runs a test of this module on a device that does not mix with the CPU: in a process of its
    /// own, because libtorch has to know the device before the first backward pass.
    #[cfg(target_os = "linux")]
    fn on_another_device(test: &str) {
        let mut child = std::process::Command::new("/proc/self/exe");
        child.args(["--exact", &format!("train::captured::tests::{test}")]);
        let output = child.env("CONVPASS_TEST_DEVICE", "accelerator").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn replays_train_the_same_weights_on_another_device() {
        on_another_device("replays_train_the_weights_of_the_run_without_them");
        on_another_device("a_backbone_in_bf16_is_captured_with_the_casts_of_the_weights");
        on_another_device("a_replay_that_computes_something_else_is_an_error");
    }

    /// A pass that waits cannot be captured. A captured run has seven passes more than another one:
    /// three before the recording, the recording, and three comparisons, each of which waits once.
    #[cfg(target_os = "linux")]
    #[test]
    fn comparisons_alone_wait_for_the_device() {
        if device() == Device::Cpu {
            return on_another_device("comparisons_alone_wait_for_the_device");
        }
        let waits = |cuda_graph| {
            let accelerator = convpass_accelerator::Accelerator::hold();
            let mut model = model_on(backbone(), bypass(0.0));
            let graphs = StandIns::of(&model, Fault::None);
            let config = TrainConfig { cuda_graph, ..config() };
            let run =
                || run(&mut model, &config, FitOptions::default(), &mut Silent, &graphs).unwrap();
            accelerator.count(run).1.waits()
        };
        assert_eq!(waits(true), waits(false) + 3);
    }

    /// Ends a run after so many steps.
    struct Stop(usize);

    impl Observer for Stop {
        fn step(&mut self, _step: &StepReport) -> ControlFlow<()> {
            self.0 -= 1;
            if self.0 == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }

    #[test]
    fn a_run_that_was_ended_is_captured_anew_and_goes_on() {
        let build = || model_on(backbone(), bypass(0.0));
        let mut whole = build();
        let graphs = StandIns::of(&whole, Fault::None);
        let expected =
            run(&mut whole, &config(), FitOptions::default(), &mut Silent, &graphs).unwrap();
        let without = TrainConfig { cuda_graph: false, ..config() };
        for after in [1, 3, 4, 8] {
            let folder = tempfile::tempdir().unwrap();
            let checkpoint = RunCheckpoint { path: folder.path().join("state"), every: 1000 };
            let part = |observer: &mut dyn Observer| {
                let mut model = build();
                let graphs = StandIns::of(&model, Fault::None);
                let options = FitOptions { checkpoint: Some(&checkpoint), ..FitOptions::default() };
                let fit = run(&mut model, &config(), options, observer, &graphs).unwrap();
                (model, fit, graphs.replays.get())
            };
            let (mut stopped, _, first) = part(&mut Stop(after));
            // The sums of the two may be rounded differently.
            let options = FitOptions { checkpoint: Some(&checkpoint), ..FitOptions::default() };
            let other = run(&mut stopped, &without, options, &mut Silent, &graphs).unwrap_err();
            assert!(matches!(&other, Error::OtherRun { .. }), "{other}");
            let (model, fit, rest) = part(&mut Silent);
            assert_eq!((first, first + rest), (after, 9));
            assert_eq!(weights(&model), weights(&whole), "{after}");
            assert_eq!(reports(&fit), reports(&expected), "{after}");
        }
    }

    /// Returns the error of a run, which leaves the weights as they were.
    fn error_of(model: &mut PetlModel, config: &TrainConfig, fault: Fault) -> Error {
        let before = weights(model);
        let graphs = StandIns::of(model, fault);
        let refused = run(model, config, FitOptions::default(), &mut Silent, &graphs).unwrap_err();
        assert_eq!(weights(model), before, "{refused}");
        refused
    }

    #[test]
    fn a_step_that_cannot_be_captured_is_refused_before_the_first_one() {
        let plain = || model_on(backbone(), bypass(0.0));
        let refused = |model: &mut PetlModel, change: fn(&mut TrainConfig)| {
            let mut config = config();
            change(&mut config);
            error_of(model, &config, Fault::None).to_string()
        };
        for (change, expected) in [
            (
                (|config| config.accumulate = 2) as fn(&mut TrainConfig),
                "TrainConfig.accumulate must be 1 with cuda_graph, found 2",
            ),
            (
                |config| config.micro_batch_size = Some(2),
                "TrainConfig.micro_batch_size must be none with cuda_graph, found 2",
            ),
            (
                |config| config.recompute = true,
                "TrainConfig.recompute must be false with cuda_graph, found true",
            ),
        ] {
            assert_eq!(refused(&mut plain(), change), expected);
        }
        let settings = PetlConfig { drop_path: 0.2, ..plain().config().clone() };
        let mut dropping = PetlModel::new(backbone(), &settings).unwrap();
        let expected =
            "PetlConfig.drop_path must be 0 with cuda_graph, whose replays draw nothing, found 0.2";
        assert_eq!(refused(&mut dropping, |_| {}), expected);
        let expected = "dropout must be 0 with cuda_graph, whose replays draw nothing, found 0.1";
        for method in [
            bypass(0.1),
            Method::Fact(FactConfig { dropout: 0.1, ..Default::default() }),
            Method::Vpt(VptConfig { dropout: 0.1, ..Default::default() }),
        ] {
            assert_eq!(refused(&mut model_on(backbone(), method), |_| {}), expected);
        }
        let coded = LowBitConfig { bits: 2, method: Box::new(bypass(0.0)) };
        let expected = "TrainConfig.cuda_graph must be false for a model that copies from the CPU \
                        in each pass, found true";
        assert_eq!(refused(&mut model_on(backbone(), Method::LowBit(coded)), |_| {}), expected);
    }

    #[test]
    fn a_model_on_the_cpu_is_refused() {
        let mut model = model_on(backbone(), bypass(0.0));
        let options = FitOptions::default();
        let train = images(14, 0);
        let config = TrainConfig { selection: Selection::LastEpoch, ..config() };
        let refused = fit_with(&mut model, &train, None, &config, options, &mut Silent);
        let refused = refused.unwrap_err();
        let Error::Config { config: Some("TrainConfig"), field, found, .. } = &refused else {
            panic!("{refused}");
        };
        assert_eq!(field, "cuda_graph");
        assert!(found.starts_with("a model on Cpu"), "{found}");
    }

    #[test]
    fn the_error_of_a_capture_is_that_of_the_run() {
        let mut model = model_on(backbone(), bypass(0.0));
        let refused = error_of(&mut model, &config(), Fault::Capture);
        assert!(matches!(&refused, Error::Torch(e) if e.to_string().contains("capturing")));
    }

    #[test]
    fn a_replay_that_computes_something_else_is_an_error() {
        for (fault, replays, expected) in [
            (Fault::Gradient(1), 1, "gradient of head.bias"),
            (Fault::Gradient(3), 3, "gradient of head.bias"),
            (Fault::Stale(2), 2, "loss"),
        ] {
            let mut model = model_on(backbone(), bypass(0.0));
            let graphs = StandIns::of(&model, fault);
            let found = run(&mut model, &config(), FitOptions::default(), &mut Silent, &graphs)
                .unwrap_err();
            let Error::CaptureDiffers { what, difference, limit } = found else {
                panic!("{found}");
            };
            assert_eq!((what.as_str(), graphs.replays.get()), (expected, replays), "{fault:?}");
            assert!(difference > limit);
        }
    }

    #[test]
    fn differences_are_relative_and_small_gradients_are_seen_beside_all() {
        let alike = |norms: &[f64]| first_difference(norms, 1e-3).is_none();
        assert!(alike(&[5e-4, 1.0, 5e-3, 10.0, 0.0, 0.0]));
        assert!(alike(&[0.0, 0.0, 0.0, 0.0]));
        // The joint norm is 10: a gradient of rounding alone, and one that is wrong.
        assert!(alike(&[0.0, 1.0, 0.0, 10.0, 5e-5, 1e-5]));
        let wrong = first_difference(&[0.0, 1.0, 0.0, 10.0, 2e-3, 1e-3], 1e-3).unwrap();
        assert!(wrong.0 == 2 && (wrong.1 - 0.02).abs() < 1e-6);
        assert_eq!(first_difference(&[0.5, 1.0, 0.0, 1.0], 1e-3), Some((0, 0.5)));
        let (index, difference) = first_difference(&[0.0, 1.0, f64::NAN, 1.0], 1e-3).unwrap();
        assert!(index == 1 && difference.is_nan());
        assert!(alike(&[f64::NAN, f64::NAN, 0.0, 1.0]), "the loop reports it");
    }

    /// Takes the gradients away after its steps, as an optimizer in PyTorch does by default.
    struct Clearing(Vec<Tensor>);

    impl Optimizer for Clearing {
        fn step(&mut self, _lr: f64) -> Result<()> {
            self.0.iter().try_for_each(clear_gradient)
        }

        fn state(&self) -> Result<Vec<(String, Tensor)>> {
            Ok(Vec::new())
        }

        fn resume(&mut self, _steps: usize) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_optimizer_that_replaces_gradients_is_refused() {
        let mut model = model_on(backbone(), bypass(0.0));
        let mut optimizer = Clearing(model.var_store().trainable_variables());
        let graphs = StandIns::of(&model, Fault::None);
        let options = FitOptions { optimizer: Some(&mut optimizer), ..FitOptions::default() };
        let refused = run(&mut model, &config(), options, &mut Silent, &graphs).unwrap_err();
        assert!(matches!(&refused, Error::Input { argument: "optimizer", .. }), "{refused}");
        assert_eq!(graphs.replays.get(), 1);
    }
}
