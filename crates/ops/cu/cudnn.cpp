// Causal attention through cuDNN, behind C functions that src/cuda/cudnn.rs calls.
//
// Built on NVIDIA's header-only cudnn-frontend. cuDNN itself is opened at run time, from the file
// that the caller names, so nothing here links it. No exception leaves a function: each returns a
// status and writes what went wrong into a buffer of the caller's.

#include <cudnn_frontend.h>

#include <algorithm>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace fe = cudnn_frontend;
using fe::graph::Tensor_attributes;
using Tensor = std::shared_ptr<Tensor_attributes>;

// The frontend looks its functions up here.
void *fe::cudnn_dlhandle = nullptr;

namespace {

enum Status : int32_t { DONE = 0, UNSUPPORTED = 1, FAILED = 2 };

// The places of tensors in the list that relufy_cudnn_run takes; forward ends with STATS.
enum Place : int64_t { Q, K, V, OUT, STATS, D_OUT, D_Q, D_K, D_V, PLACES };

struct Failure {
    Status status;
    std::string text;
};

void check(fe::error_t const &error) {
    if (error.is_good()) {
        return;
    }
    // A library that cuDNN opens in turn, such as NVRTC, is missing: that is no property of the shape.
    if (error.err_msg.find("PREREQUISITE_MISSING") != std::string::npos) {
        throw Failure{FAILED, error.err_msg};
    }
    switch (error.code) {
        case fe::error_code_t::GRAPH_NOT_SUPPORTED:
        case fe::error_code_t::UNSUPPORTED_GRAPH_FORMAT:
        case fe::error_code_t::HEURISTIC_QUERY_FAILED:
        case fe::error_code_t::GRAPH_EXECUTION_PLAN_CREATION_FAILED:
            throw Failure{UNSUPPORTED, error.err_msg};
        default:
            throw Failure{FAILED, error.err_msg};
    }
}

void check(cudnnStatus_t status, const char *call) {
    if (status != CUDNN_STATUS_SUCCESS) {
        throw Failure{FAILED, std::string(call) + ": " + fe::detail::get_error_string(status) + " " +
                                  fe::detail::get_last_error_string_()};
    }
}

// Runs `body` and turns what it throws into a status and a text.
template <typename Body>
int32_t guarded(char *text, size_t room, Body body) noexcept {
    auto say = [&](const char *what) {
        size_t length = room == 0 ? 0 : std::min(std::strlen(what), room - 1);
        std::memcpy(text, what, length);
        if (room > 0) {
            text[length] = 0;
        }
    };
    try {
        body();
        return DONE;
    } catch (Failure const &failure) {
        say(failure.text.c_str());
        return failure.status;
    } catch (std::exception const &error) {
        say(error.what());
    } catch (...) {
        say("an exception of unknown type");
    }
    return FAILED;
}

}  // namespace

extern "C" {

// Mirrored in src/cuda/cudnn.rs.
struct RelufyCudnnShape {
    int64_t batch, len, heads, kv_heads, head_dim;
    float scale;
    int32_t capability;  // 90 for 9.0
    int32_t backward;
    int32_t deterministic;
};

}  // extern "C"

namespace {

// One direction of attention over packed rows of q|k|v, compiled by cuDNN for one shape.
struct Plan {
    std::shared_ptr<fe::graph::Graph> graph = std::make_shared<fe::graph::Graph>();
    int64_t places = 0;

    Plan(cudnnHandle_t handle, RelufyCudnnShape const &shape) {
        graph->set_io_data_type(fe::DataType_t::BFLOAT16)
            .set_intermediate_data_type(fe::DataType_t::FLOAT)
            .set_compute_data_type(fe::DataType_t::FLOAT)
            .set_sm_version(shape.capability);
        int64_t const h = shape.heads, kv = shape.kv_heads, d = shape.head_dim;
        packed_width = (h + 2 * kv) * d;
        Tensor q = input(rows(Q, shape, h, packed_width));
        Tensor k = input(rows(K, shape, kv, packed_width));
        Tensor v = input(rows(V, shape, kv, packed_width));
        if (shape.backward != 0) {
            backward(shape, q, k, v);
        } else {
            forward(shape, q, k, v);
        }
        check(graph->validate());
        check(graph->build_operation_graph(handle));
        check(graph->create_execution_plans({fe::HeurMode_t::A}));
        check(graph->check_support());
        check(graph->build_plans());
    }

   private:
    int64_t packed_width = 0;

    // [batch, heads, len, head_dim] in rows of `width` columns, one row a token.
    static Tensor_attributes rows(Place place, RelufyCudnnShape const &shape, int64_t heads, int64_t width) {
        return Tensor_attributes()
            .set_uid(place + 1)
            .set_dim({shape.batch, heads, shape.len, shape.head_dim})
            .set_stride({shape.len * width, shape.head_dim, width, 1})
            .set_data_type(fe::DataType_t::BFLOAT16);
    }

    // Dense: backward kernels of cuDNN before 9.26 do not all heed other strides.
    static Tensor_attributes stats(RelufyCudnnShape const &shape) {
        return Tensor_attributes()
            .set_uid(STATS + 1)
            .set_dim({shape.batch, shape.heads, shape.len, 1})
            .set_stride({shape.heads * shape.len, shape.len, 1, 1})
            .set_data_type(fe::DataType_t::FLOAT);
    }

    Tensor input(Tensor_attributes const &like) { return graph->tensor(like); }

    static void output(Tensor const &tensor, Tensor_attributes const &like) {
        tensor->set_output(true)
            .set_uid(like.get_uid())
            .set_dim(like.get_dim())
            .set_stride(like.get_stride())
            .set_data_type(like.get_data_type());
    }

    void forward(RelufyCudnnShape const &shape, Tensor const &q, Tensor const &k, Tensor const &v) {
        places = STATS + 1;
        // The unified operation takes causal masks from cuDNN 9.21 on only.
        auto attention = fe::graph::SDPA_attributes()
                             .set_name("attention")
                             .set_generate_stats(true)
                             .set_attn_scale(shape.scale)
                             .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
                             .set_diagonal_band_right_bound(0)
                             .set_implementation(fe::AttentionImplementation_t::COMPOSITE);
        auto [out, lse] = graph->sdpa(q, k, v, attention);
        output(out, rows(OUT, shape, shape.heads, shape.heads * shape.head_dim));
        output(lse, stats(shape));
    }

    void backward(RelufyCudnnShape const &shape, Tensor const &q, Tensor const &k, Tensor const &v) {
        places = PLACES;
        int64_t const width = shape.heads * shape.head_dim;
        auto attention = fe::graph::SDPA_backward_attributes()
                             .set_name("attention_backward")
                             .set_attn_scale(shape.scale)
                             .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
                             .set_diagonal_band_right_bound(0)
                             .set_deterministic_algorithm(shape.deterministic != 0);
        Tensor out = input(rows(OUT, shape, shape.heads, width));
        Tensor d_out = input(rows(D_OUT, shape, shape.heads, width));
        auto [dq, dk, dv] = graph->sdpa_backward(q, k, v, out, d_out, input(stats(shape)), attention);
        output(dq, rows(D_Q, shape, shape.heads, packed_width));
        output(dk, rows(D_K, shape, shape.kv_heads, packed_width));
        output(dv, rows(D_V, shape, shape.kv_heads, packed_width));
    }
};

}  // namespace

extern "C" {

// Opens cuDNN, once in a process.
int32_t relufy_cudnn_open(const char *file, size_t *version, char *text, size_t room) {
    return guarded(text, room, [&] {
        fe::cudnn_dlhandle = dlopen(file, RTLD_NOW | RTLD_LOCAL);
        if (fe::cudnn_dlhandle == nullptr) {
            const char *why = dlerror();
            throw Failure{FAILED, why == nullptr ? "dlopen failed" : why};
        }
        *version = fe::detail::get_backend_version();
    });
}

// A handle that queues its work on `stream`, in the current context.
int32_t relufy_cudnn_handle(void *stream, void **handle, char *text, size_t room) {
    return guarded(text, room, [&] {
        cudnnHandle_t made = nullptr;
        check(fe::detail::create_handle(&made), "cudnnCreate");
        check(fe::detail::set_stream(made, static_cast<cudaStream_t>(stream)), "cudnnSetStream");
        *handle = made;
    });
}

// Builds a plan and says how many bytes it works in.
int32_t relufy_cudnn_plan(void *handle, RelufyCudnnShape const *shape, void **plan, size_t *workspace,
                          char *text, size_t room) {
    return guarded(text, room, [&] {
        auto made = std::make_unique<Plan>(static_cast<cudnnHandle_t>(handle), *shape);
        int64_t bytes = 0;
        check(made->graph->get_workspace_size(bytes));
        *workspace = static_cast<size_t>(bytes);
        *plan = made.release();
    });
}

void relufy_cudnn_free(void *plan) { delete static_cast<Plan *>(plan); }

// Queues a plan. `tensors` are addresses on the GPU, in the order of Place.
int32_t relufy_cudnn_run(void *handle, void *plan, uint64_t const *tensors, uint64_t workspace, char *text,
                         size_t room) {
    return guarded(text, room, [&] {
        Plan const &ready = *static_cast<Plan const *>(plan);
        std::unordered_map<int64_t, void *> pack;
        for (int64_t place = 0; place < ready.places; ++place) {
            pack.emplace(place + 1, reinterpret_cast<void *>(tensors[place]));
        }
        check(ready.graph->execute(static_cast<cudnnHandle_t>(handle), pack,
                                   reinterpret_cast<void *>(workspace)));
    });
}

}  // extern "C"
