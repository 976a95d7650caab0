#include "parallel/point_to_point.hpp"

#include <mpi.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/error.hpp"

namespace upcycle::mpi {
namespace {

constexpr int kExchangeTag = 1, kSendTag = 2;  // a pipeline's messages never meet a collective's

template <class Call>
void in_pieces(Block block, int64_t piece_bytes, Call&& call) {
  for (int64_t begin = 0; begin < block.bytes; begin += piece_bytes) {
    call(block.data + begin, static_cast<int>(std::min(piece_bytes, block.bytes - begin)));
  }
}

std::string explain(int code) {
  std::string words(MPI_MAX_ERROR_STRING, '\0');
  int length = 0;
  if (MPI_Error_string(code, words.data(), &length) != MPI_SUCCESS) return text("error ", code);
  words.resize(static_cast<size_t>(length));
  return words;
}

void check_count(const MPI_Status& status, int expected) {
  int received = 0;
  check(MPI_Get_count(&status, MPI_BYTE, &received), "MPI_Get_count");
  if (received != expected) {
    throw std::runtime_error(
        text("rank ", status.MPI_SOURCE, " of the group sent ", received, " bytes where ", expected, " were expected"));
  }
}

// Sends and receives on their way. Receives come first, so that their statuses do.
class Requests {
 public:
  void receive(MPI_Comm comm, Block block, int from, int tag, int64_t piece_bytes) {
    in_pieces(block, piece_bytes, [&](std::byte* data, int bytes) {
      expected_.push_back(bytes);
      check(MPI_Irecv(data, bytes, MPI_BYTE, from, tag, comm, &requests_.emplace_back()), "MPI_Irecv");
    });
  }
  void send(MPI_Comm comm, Block block, int to, int tag, int64_t piece_bytes) {
    in_pieces(block, piece_bytes, [&](std::byte* data, int bytes) {
      check(MPI_Isend(data, bytes, MPI_BYTE, to, tag, comm, &requests_.emplace_back()), "MPI_Isend");
    });
  }
  void wait() {
    std::vector<MPI_Status> statuses(requests_.size());
    const int code = MPI_Waitall(static_cast<int>(requests_.size()), requests_.data(), statuses.data());
    if (code == MPI_ERR_IN_STATUS) {
      for (const MPI_Status& status : statuses) {  // the request that failed, not those which never came to their turn
        if (status.MPI_ERROR != MPI_ERR_PENDING) check(status.MPI_ERROR, "MPI_Waitall");
      }
    }
    check(code, "MPI_Waitall");
    for (size_t i = 0; i < expected_.size(); ++i) check_count(statuses[i], expected_[i]);
  }

 private:
  std::vector<MPI_Request> requests_;
  std::vector<int> expected_;   // bytes of each receive
};

}  // namespace

void check(int code, const char* call) {
  if (code != MPI_SUCCESS) throw std::runtime_error(text(call, ": ", explain(code)));
}

void exchange(int communicator, std::span<const Block> to_each, std::span<const Block> from_each, int64_t piece_bytes) {
  const MPI_Comm comm = MPI_Comm_f2c(communicator);
  const int size = static_cast<int>(to_each.size());
  int rank = 0;
  check(MPI_Comm_rank(comm, &rank), "MPI_Comm_rank");

  std::vector<Peer> to, from;   // the neighbours first, so that not everybody sends to the same rank
  for (int step = 0; step < size; ++step) {
    const int after = (rank + step) % size, before = (rank - step + size) % size;
    to.push_back({after, to_each[after]});
    from.push_back({before, from_each[before]});
  }
  exchange_runs(communicator, to, from, piece_bytes);
}

void exchange_runs(int communicator, std::span<const Peer> to, std::span<const Peer> from, int64_t piece_bytes) {
  const MPI_Comm comm = MPI_Comm_f2c(communicator);
  int rank = 0;
  check(MPI_Comm_rank(comm, &rank), "MPI_Comm_rank");

  Requests requests;
  std::vector<Block> own_from, own_to;
  for (const auto& [peer, block] : from) {
    if (peer == rank) own_to.push_back(block);
    else requests.receive(comm, block, peer, kExchangeTag, piece_bytes);
  }
  for (const auto& [peer, block] : to) {
    if (peer == rank) own_from.push_back(block);
    else requests.send(comm, block, peer, kExchangeTag, piece_bytes);
  }
  const auto alike = [](const Block& a, const Block& b) { return a.bytes == b.bytes; };
  if (!std::equal(own_from.begin(), own_from.end(), own_to.begin(), own_to.end(), alike)) throw std::logic_error("exchange: a rank disagrees with itself");
  for (size_t i = 0; i < own_from.size(); ++i) {
    if (own_from[i].bytes > 0 && own_from[i].data != own_to[i].data) std::memcpy(own_to[i].data, own_from[i].data, static_cast<size_t>(own_from[i].bytes));
  }
  requests.wait();
}

void send_receive(int communicator, std::span<const Peer> to, std::span<const Peer> from, int64_t piece_bytes) {
  const MPI_Comm comm = MPI_Comm_f2c(communicator);
  Requests requests;
  for (const Peer& peer : from) requests.receive(comm, peer.block, peer.rank, kSendTag, piece_bytes);
  for (const Peer& peer : to) requests.send(comm, peer.block, peer.rank, kSendTag, piece_bytes);
  requests.wait();
}

void send(int communicator, Block block, int to, int64_t piece_bytes) {
  in_pieces(block, piece_bytes, [&](const std::byte* data, int bytes) {
    check(MPI_Send(data, bytes, MPI_BYTE, to, kSendTag, MPI_Comm_f2c(communicator)), "MPI_Send");
  });
}

void receive(int communicator, Block block, int from, int64_t piece_bytes) {
  in_pieces(block, piece_bytes, [&](std::byte* data, int bytes) {
    MPI_Status status;
    check(MPI_Recv(data, bytes, MPI_BYTE, from, kSendTag, MPI_Comm_f2c(communicator), &status), "MPI_Recv");
    check_count(status, bytes);
  });
}

void broadcast(int communicator, Block block, int root, int64_t piece_bytes) {
  in_pieces(block, piece_bytes, [&](std::byte* data, int bytes) {
    check(MPI_Bcast(data, bytes, MPI_BYTE, root, MPI_Comm_f2c(communicator)), "MPI_Bcast");
  });
}

}  // namespace upcycle::mpi
