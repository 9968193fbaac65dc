// The row kernel. Included once by each rows_*.cpp, which says how wide a vector is.
//
// A row is read once from memory (normalise.h). The exponentials that its gradient takes stay in scratch, which the caches hold. kl.h or
// mixtures.h takes D from them. They wait there for the next row, in whose first sweep the gradient is written (gradient.h).
// Rows of one dtype without -inf are swept where they lie. Any others (two dtypes, transforms, -inf) are first copied to fp32 in the
// caller's scratch, where -inf is a logit low enough for its probability to be 0. Mixtures and total variation need no more. An entry
// whose term of a KL would be infinite is taken from the KL's first side: with K, the mass of p without these entries, the sum of
// p log(p/q) over the others is K (KL(p/K‖q) + log K).
#pragma once
#include <utility>

#include "dense/gradient.h"
#include "dense/rows.h"

namespace pocl {
namespace {

template <class Format>
inline float element(const typename Format::Storage* p) {
    return load_some<Format>(p, 1, 0.0f)[0];
}

/// One row's task, resolved.
struct Row {
    std::int64_t n, V, V_s, label;
    float row_scale, c;  // c: the factor on D
    const Task* task;
    float* scratch;
};

/// D and what its gradient needs, by the one divergence.
template <Family family, class S>
inline void compare(double teacher_share, const Rows<S, S>& rows, const Pieces& pieces, const Kept& kept, const RowFacts& f, Values& out) {
    if constexpr (is_kl(family)) {
        const KlSums sums = kl<family>(rows, pieces, f, kept);
        const double whole = sums.D + f.log_kept;
        out.D = f.kept * whole;
        if (family == Family::reverse_kl && f.kept != 1) {
            out.pull = (1 - f.kept) * (whole + 1);
            out.pull_out = -(whole + 1);
        }
        out.known = family == Family::reverse_kl ? sums.D - out.pull : sums.excess;
        out.small = sums.small;
    } else {
        const MixtureSums sums = mixture<family>(rows, pieces, f, teacher_share, kept);
        out.D = sums.D;
        out.known = sums.u;
        out.unit = sums.unit;
        out.factor = mixture_factor(family, teacher_share);
    }
}

/// Compiles `compare` for each family, and calls the task's.
template <class S, int... known>
inline void compare_by_family(const Task& task, const Rows<S, S>& rows, const Pieces& pieces, const Kept& kept, const RowFacts& f, Values& out,
                              std::integer_sequence<int, known...>) {
    ((task.family == kFamilies[known].family ? compare<kFamilies[known].family>(task.teacher_share, rows, pieces, kept, f, out) : void()), ...);
}

/// Once for all first sweeps of a dtype: a call a row.
template <class S>
POCL_ONCE Values evaluate(const Row& row, const Rows<S, S>& rows, const Pieces& pieces, const Kept& kept, const RowFacts& f, float s_label) {
    const Task& task = *row.task;
    Values out;
    if (f.compared) compare_by_family(task, rows, pieces, kept, f, out, std::make_integer_sequence<int, kFamilyCount>{});
    if (f.broken) out.D = __builtin_nan("");
    out.no_softmax = f.ce.z == 0;
    const double below = f.ce.log2_of(s_label);
    out.ce = out.no_softmax || s_label == -kInf ? kInf : below > 0 ? 0 : -kLn2 * below;  // the sum's rounding may leave it above 0
    const Transform& transform = task.student_transform;
    out.w = Weights{!f.compared ? 0.0f : static_cast<float>(f.kept) * row.row_scale * (1.0f - f.alpha) * row.c / f.tau, out.no_softmax ? 0.0f : row.row_scale * f.alpha,
                    transform.scale, transform.softcap == 0.0f ? 0.0f : 1.0f / transform.softcap};
    return out;
}

/// The label's entry of the gradient again, with its -1: one rounding to the gradient's dtype, not two. label_s, label_t: its logits.
template <class G>
inline void put_label(const Row& row, const RowFacts& f, const Values& values, float label_s, float label_t, float slope, typename G::Storage* out) {
    if (values.w.ce == 0.0f) return;
    double d_term = values.label_out;
    if (row.label < row.V && f.compared && label_s > 2 * f.floor) {
        const double log_q = kLn2 * f.q.log2_of(label_s), log_p = kLn2 * f.p.log2_of(label_t);
        d_term = label_gradient(row.task->family, log_q, log_p, row.task->teacher_share, values.known);
    }
    Float g = {};
    g[0] = static_cast<float>((values.w.d * d_term + values.w.ce * ::expm1(-values.ce)) * slope);
    store_some<G>(out + row.label, g, 1);
}

/// Both sides over all that they have of the shared vocabulary.
struct Sides {
    const Side &q, &p;
};

inline void put_stats(const Row& row, const RowFacts& f, const Sides& sides, const Values& values, float s_label) {
    const Task& task = *row.task;
    const double weighted_ce = f.alpha == 0.0f && values.ce == values.ce ? 0.0 : f.alpha * values.ce;
    const double loss = weighted_ce + (1.0 - f.alpha) * row.c * values.D;
    const double stats[kStats] = {loss, values.ce, values.D, f.s_any ? sides.q.entropy() : 0, f.t_any ? sides.p.entropy() : 0,
                             !values.no_softmax && s_label == f.ce.max ? 1.0 : 0.0, f.s_any && f.t_any && f.agree ? 1.0 : 0.0};
    for (int k = 0; k < kStats; ++k) task.stats[k * task.student.rows + row.n] = static_cast<float>(stats[k]);
}

inline RowFacts begin_row(const Task& task, std::int64_t n) {
    RowFacts f;
    f.tau = task.temperature[n];
    f.alpha = task.alpha[n];
    f.floor = kLowest * (f.tau < 1.0f ? f.tau : 1.0f);
    f.q.factor = f.p.factor = kLog2E / f.tau;
    f.ce.factor = kLog2E;
    return f;
}

/// A row's logits as the model means them, in fp32.
template <class Format>
inline void copy_transformed(const typename Format::Storage* from, std::int64_t count_all, const Transform& transform, float* to) {
    const float scale = transform.scale, softcap = transform.softcap;
    for_vectors(0, count_all, [&](std::int64_t v, int count, auto rest) {
        Float x = load<Format, rest.value>(from + v, count, 0.0f);
        if (softcap != 0.0f) x = select((x == kInf) | (x == -kInf), x, softcap * tanh_of(x * (scale / softcap)));
        else if (scale != 1.0f) x = select(x == -kInf, x, max(broadcast(-3.40282347e38f), x * scale));  // a finite mask stays one
        store<F32, rest.value>(to + v, x, count);
    });
}

inline void copy_row(const Matrix& matrix, std::int64_t n, std::int64_t count, const Transform& transform, float* to) {
    const std::int64_t first = n * matrix.row_stride;
    switch (matrix.dtype) {
        case DType::float32: return copy_transformed<F32>(static_cast<const float*>(matrix.data) + first, count, transform, to);
        case DType::bfloat16: return copy_transformed<BF16>(static_cast<const std::uint16_t*>(matrix.data) + first, count, transform, to);
        case DType::float16: return copy_transformed<FP16>(static_cast<const std::uint16_t*>(matrix.data) + first, count, transform, to);
    }
}

/// The scratch of one row: what the sweeps keep, and as many arrays again for copies.
struct Scratch {
    Kept kept;
    float *c, *s, *t;  // CE's logits, and those of D where they are not the task's own
    Scratch(float* memory, std::int64_t V_s) {
        const std::int64_t size = scratch_array(V_s);
        kept = {memory, memory + size, memory + 2 * size, memory + 6 * size, memory + 6 * size + scratch_blocks(V_s)};
        c = memory + 3 * size;
        s = memory + 4 * size;
        t = memory + 5 * size;
    }
};

/// Copies D's logits out of CE's and the teacher's transformed ones; one that is -inf becomes low enough for a probability of 0. Whether
/// an entry is to be left out of D's first side.
template <Moment moment>
inline bool copy_shared(const Scratch& scratch, std::int64_t V, RowFacts& f) {
    constexpr bool is_kl = moment != Moment::none;
    const Float floor = broadcast(f.floor * 0.999f), lowest = broadcast(2.0f * f.floor);  // floor: above what `normalise` takes for too low
    Int s_any = {}, t_any = {}, both = {}, left_out = {};
    for_vectors(0, V, [&](std::int64_t v, int count, auto rest) {
        const Float x = load<F32, rest.value>(scratch.c + v, count, -kInf), y = load<F32, rest.value>(scratch.t + v, count, -kInf);
        const Int no_q = x == -kInf, no_p = y == -kInf;
        s_any |= ~no_q;
        t_any |= ~no_p;
        if constexpr (is_kl) both |= ~(no_q | no_p);
        if constexpr (is_kl) left_out |= moment == Moment::of_p ? no_q & ~no_p : no_p & ~no_q;
        // NaN passes through max as its second argument
        store<F32, rest.value>(scratch.s + v, select(no_q, lowest, max(floor, x)), count);
        store<F32, rest.value>(scratch.t + v, select(no_p, lowest, max(floor, y)), count);
    });
    f.s_any = any(s_any);
    f.t_any = any(t_any);
    f.compared = is_kl ? any(both) : f.s_any && f.t_any;
    return any(left_out);
}

/// Moves the entries that only the first side of a KL has from it to `left_out`, and leaves -inf elsewhere there.
inline void leave_out(float* first, const float* second, float* left_out, std::int64_t V, float floor) {
    const Float lowest = broadcast(2.0f * floor);
    for_vectors(0, V, [&](std::int64_t v, int count, auto rest) {
        const Float x = load<F32, rest.value>(first + v, count, 0.0f);
        const Int out = (load<F32, rest.value>(second + v, count, 0.0f) == lowest) & (x != lowest);
        store<F32, rest.value>(left_out + v, select(out, x, broadcast(-kInf)), count);
        store<F32, rest.value>(first + v, select(out, lowest, x), count);
    });
}

/// What the entries that are left out of a KL's first side mean for the row; the whole of that side.
inline Side take_left_out(const Side& first, const Side& left_out, RowFacts& f) {
    const Side whole = joined(first, left_out);
    const double less = left_out.z * whole.weight(left_out.max), kept = first.z * whole.weight(first.max);
    f.kept = less < 0.5 ? 1 - less : kept;  // of the small one all digits
    f.log_kept = less < 0.5 ? ::log1p(-less) : ::log(kept);
    f.compared = f.compared && f.kept != 0;
    f.agree = f.agree && !(left_out.max > first.max);
    return whole;
}

/// Adds the gradient of reverse KL where terms are left out; `q`: the whole student.
inline void add_left_out(const float* left_out, std::int64_t V, const Side& q, double weight, float* g) {
    const Exponents exponents(q);
    const Float factor = broadcast(static_cast<float>(weight / q.z));
    for_vectors(0, V, [&](std::int64_t v, int count, auto rest) {
        const Float x = load<F32, rest.value>(left_out + v, count, -kInf), sum = load<F32, rest.value>(g + v, count, 0.0f);
        store<F32, rest.value>(g + v, fma(factor, exp2_of(exponents(x)), sum), count);
    });
}

/// The row by way of fp32 copies.
template <Moment moment, class G>
void copied_row(const Row& row, const Output<G>& out) {
    const Task& task = *row.task;
    RowFacts f = begin_row(task, row.n);
    const Scratch scratch(row.scratch, row.V_s);
    const Pieces pieces{row.V, 0};
    copy_row(task.student, row.n, row.V_s, task.student_transform, scratch.c);
    copy_row(task.teacher, row.n, row.V, task.teacher_transform, scratch.t);
    const bool some_left_out = copy_shared<moment>(scratch, row.V, f);
    constexpr bool of_p = moment == Moment::of_p;
    float* const left_out = scratch.kept.third;
    Side out_of_first;
    if (some_left_out) {
        if (of_p) leave_out(scratch.t, scratch.s, left_out, row.V, f.floor);
        else leave_out(scratch.s, scratch.t, left_out, row.V, f.floor);
        out_of_first = side_of(left_out, row.V, f.q.factor);
    }
    const float floor_before = f.floor;
    f.floor *= 2.5f;  // every logit is fit to be swept now
    normalise<moment, OwnCe::no, F32, F32>(scratch.s, scratch.t, pieces, scratch.kept, f, Unfit::goes_on);
    f.floor = floor_before;
    Side q = f.q, p = f.p;
    if (some_left_out) (of_p ? p : q) = take_left_out(of_p ? f.p : f.q, out_of_first, f);
    f.broken = !::isfinite(q.z + p.z);
    normalise_ce<F32>(scratch.c, 0, row.V_s, f.ce);
    const float s_label = scratch.c[row.label];
    const bool shared = row.label < row.V;
    Values values = evaluate<F32>(row, Rows<F32, F32>{scratch.s, scratch.t}, pieces, scratch.kept, f, s_label);
    if (some_left_out && !of_p && shared && left_out[row.label] != -kInf)
        values.label_out = values.pull_out * ::exp2(q.log2_of(s_label));
    put_stats(row, f, Sides{q, p}, values, s_label);
    if (out.row == nullptr) return;
    float* const g = scratch.kept.first;  // over what it is computed from
    const std::int64_t done = f.compared ? row.V : 0;
    if (done > 0) Gradient<OwnCe::no, F32>{task.family, scratch.kept, pieces, f, values, Output<F32>{g, false}}.finish();
    std::memset(g + done, 0, static_cast<std::size_t>(row.V_s - done) * sizeof *g);
    if (some_left_out && !of_p && f.compared) add_left_out(left_out, row.V, q, values.w.d * values.pull_out, g);
    const CrossEntropy ce(f, values.w);
    for_vectors(0, row.V_s, [&](std::int64_t v, int count, auto rest) {
        const Float c = load<F32, rest.value>(scratch.c + v, count, -kInf);
        Float sum = load<F32, rest.value>(g + v, count, 0.0f);
        if (values.w.ce != 0.0f) sum += ce.gradient(c);
        store<G, rest.value>(out.row + v, sum * values.w.slope(c), count);
    });
    const Float slope = values.w.slope(broadcast(s_label));
    put_label<G>(row, f, values, shared ? scratch.s[row.label] : 0.0f, shared ? scratch.t[row.label] : 0.0f, slope[0], out.row);
}

/// A row whose gradient is still in scratch, where it waits for the next row's first sweep.
template <class S>
struct Waiting {
    bool any = false;
    OwnCe own_ce = OwnCe::no;
    Row row{};
    Pieces pieces{};
    RowFacts f;
    Values values;
    float s_label = 0, t_label = 0;
    Output<S> out{};

    template <OwnCe ce>
    Gradient<ce, S> gradient(const Kept& kept) const {
        return {row.task->family, kept, pieces, f, values, out};
    }
    /// What is left of the gradient, and the label's entry last.
    template <OwnCe ce>
    void finish(Gradient<ce, S> left) {
        left.finish();
        put_label<S>(row, f, values, s_label, t_label, 1.0f, out.row);
        any = false;
    }
    /// All of the gradient, by itself.
    POCL_ONCE void write(const Kept& kept) {
        if (!any) return;
        if (own_ce == OwnCe::summed) finish(gradient<OwnCe::summed>(kept));
        else if (own_ce == OwnCe::at_tau_1) finish(gradient<OwnCe::at_tau_1>(kept));
        else if (own_ce == OwnCe::at_tau_2) finish(gradient<OwnCe::at_tau_2>(kept));
        else finish(gradient<OwnCe::yes>(kept));
    }
};

/// The row where it lies: student and teacher of one dtype, untransformed. False where it holds a logit that is too low for that. Writes
/// the gradient that waits, and leaves its own.
template <Moment moment, OwnCe own_ce, class S>
bool direct_row(const Row& row, const Output<S>& out, Waiting<S>& waiting) {
    using Storage = typename S::Storage;
    const Task& task = *row.task;
    RowFacts f = begin_row(task, row.n);
    const Rows<S, S> rows{static_cast<const Storage*>(task.student.data) + row.n * task.student.row_stride,
                          static_cast<const Storage*>(task.teacher.data) + row.n * task.teacher.row_stride};
    const Kept kept = Scratch(row.scratch, row.V_s).kept;
    const Pieces pieces{row.V, out.row == nullptr || out.head() > row.V ? 0 : out.head()};
    bool fit;
    if (waiting.any && waiting.own_ce == own_ce && waiting.pieces.in_step(pieces)) {
        auto gradient = waiting.template gradient<own_ce>(kept);
        fit = normalise<moment, own_ce, S, S>(rows.s, rows.t, pieces, kept, f, Unfit::stops, gradient);
        waiting.finish(gradient);
    } else {
        waiting.write(kept);
        fit = normalise<moment, own_ce, S, S>(rows.s, rows.t, pieces, kept, f, Unfit::stops);
    }
    if (!fit) return false;
    if (own_ce == OwnCe::at_tau_1) f.ce = f.q;
    normalise_ce<S>(rows.s, row.V, row.V_s, f.ce);
    const float s_label = element<S>(rows.s + row.label), t_label = row.label < row.V ? element<S>(rows.t + row.label) : 0.0f;
    const Values values = evaluate<S>(row, rows, pieces, kept, f, s_label);
    put_stats(row, f, Sides{f.q, f.p}, values, s_label);
    if (out.row == nullptr) return true;
    ce_gradient<S, S>(rows.s, row.V, row.V_s, f, values.w, out.row);
    waiting = {true, own_ce, row, pieces, f, values, s_label, t_label, out};
    return true;
}

template <Moment moment, class S>
bool direct_row_by_temperature(const Row& row, float tau, const Output<S>& out, Waiting<S>& waiting) {
    if (tau == 1.0f) return direct_row<moment, OwnCe::at_tau_1>(row, out, waiting);
    if (tau == 2.0f) return direct_row<moment, OwnCe::at_tau_2>(row, out, waiting);
    if (row.task->alpha[row.n] == 0.0f) return direct_row<moment, OwnCe::summed>(row, out, waiting);
    return direct_row<moment, OwnCe::yes>(row, out, waiting);
}

template <Moment moment, class S>
void rows_of(const Task& task, std::int64_t begin, std::int64_t end, float* scratch) {
    using Storage = typename S::Storage;
    const std::int64_t N = task.student.rows, V_s = task.student.columns;
    const std::int64_t V = V_s < task.teacher.columns ? V_s : task.teacher.columns;
    const std::int64_t row_bytes = V_s * static_cast<std::int64_t>(sizeof(Storage));
    const bool direct =
        task.teacher.dtype == task.student.dtype && task.student_transform.identity() && task.teacher_transform.identity();
    // Past the caches when the gradient is too large to stay in them anyway; not over the student's own logits, which they hold.
    const bool stream = task.gradient.data != task.student.data && row_bytes * N > (std::int64_t{16} << 20);
    Waiting<S> waiting;
    for (std::int64_t n = begin; n < end; ++n) {
        Storage* const g_row =
            task.gradient.data == nullptr ? nullptr : static_cast<Storage*>(task.gradient.data) + n * task.gradient.row_stride;
        const std::int64_t label = task.labels[n];
        if (label == task.ignore_index) {
            for (int k = 0; k < kStats; ++k) task.stats[k * N + n] = 0.0f;
            if (g_row != nullptr) std::memset(g_row, 0, static_cast<std::size_t>(row_bytes));
            continue;
        }
        const float tau = task.temperature[n];
        const Row row{n, V, V_s, label, task.row_scale[n], ::powf(tau, static_cast<float>(task.temperature_power)), &task, scratch};
        const Output<S> out{g_row, stream && g_row != nullptr};
        if (!direct || !direct_row_by_temperature<moment>(row, tau, out, waiting)) copied_row<moment>(row, out);
    }
    waiting.write(Scratch(scratch, V_s).kept);
#if defined(__AVX2__)
    if (stream) _mm_sfence();
#endif
}

template <class S>
void rows_by_moment(const Task& task, std::int64_t begin, std::int64_t end, float* scratch) {
    switch (moment_of(task.family)) {
        case Moment::none: return rows_of<Moment::none, S>(task, begin, end, scratch);
        case Moment::of_q: return rows_of<Moment::of_q, S>(task, begin, end, scratch);
        case Moment::of_p: return rows_of<Moment::of_p, S>(task, begin, end, scratch);
    }
}

inline void rows(const Task& task, std::int64_t begin, std::int64_t end, float* scratch) {
    switch (task.student.dtype) {
        case DType::float32: return rows_by_moment<F32>(task, begin, end, scratch);
        case DType::bfloat16: return rows_by_moment<BF16>(task, begin, end, scratch);
        case DType::float16: return rows_by_moment<FP16>(task, begin, end, scratch);
    }
}

}  // namespace
}  // namespace pocl
