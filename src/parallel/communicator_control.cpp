// Communicator's small messages on the host: numbers, texts, and the errors that all ranks are to know.
#include <mpi.h>

#include <limits>
#include <stdexcept>

#include "base/error.hpp"
#include "base/fault.hpp"
#include "parallel/communicator.hpp"
#include "parallel/own_time.hpp"
#include "parallel/point_to_point.hpp"

namespace upcycle {

using mpi::Block;
using mpi::check;

void Communicator::barrier() const {
  if (size() == 1) return;
  const own_time::Call call;
  check(MPI_Barrier(MPI_Comm_f2c(mpi_handle())), "MPI_Barrier");
}

int64_t Communicator::all_reduce(int64_t value, Reduce how) const {
  if (size() == 1) return value;
  const own_time::Call call;
  const MPI_Op op = how == Reduce::sum ? MPI_SUM : how == Reduce::max ? MPI_MAX : MPI_MIN;
  check(MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_INT64_T, op, MPI_Comm_f2c(mpi_handle())), "MPI_Allreduce");
  return value;
}

std::vector<int64_t> Communicator::all_gather(int64_t value) const {
  std::vector<int64_t> values(static_cast<size_t>(size()), value);
  if (size() == 1) return values;
  const own_time::Call call;
  check(MPI_Allgather(&value, 1, MPI_INT64_T, values.data(), 1, MPI_INT64_T, MPI_Comm_f2c(mpi_handle())), "MPI_Allgather");
  return values;
}

std::string Communicator::broadcast(std::string message, int root) const {
  if (size() == 1) return message;
  const own_time::Call call;
  int64_t length = static_cast<int64_t>(message.size());
  mpi::broadcast(mpi_handle(), {reinterpret_cast<std::byte*>(&length), sizeof length}, root, piece_bytes);
  message.resize(static_cast<size_t>(length));
  mpi::broadcast(mpi_handle(), {reinterpret_cast<std::byte*>(message.data()), length}, root, piece_bytes);
  return message;
}

std::vector<std::string> Communicator::all_gather(const std::string& message) const {
  std::vector<std::string> messages(static_cast<size_t>(size()), message);
  if (size() == 1) return messages;
  const own_time::Call call;
  const std::vector<int64_t> lengths = all_gather(static_cast<int64_t>(message.size()));
  std::vector<Block> from_each;
  for (size_t r = 0; r < messages.size(); ++r) {
    messages[r].resize(static_cast<size_t>(lengths[r]));
    from_each.push_back({reinterpret_cast<std::byte*>(messages[r].data()), lengths[r]});
  }
  std::string own = message;
  const Block mine{reinterpret_cast<std::byte*>(own.data()), static_cast<int64_t>(own.size())};
  mpi::exchange(mpi_handle(), std::vector<Block>(messages.size(), mine), from_each, piece_bytes);
  return messages;
}

void Communicator::agree(std::exception_ptr error) const {
  if (size() == 1) {
    if (error) std::rethrow_exception(error);
    return;
  }
  constexpr int64_t kNobody = std::numeric_limits<int64_t>::max();
  const int64_t lowest = all_reduce(error ? rank() : kNobody, Reduce::min);
  if (lowest == kNobody) return;
  std::string message;  // the first letter says the kind
  if (error) {
    try {
      std::rethrow_exception(error);
    } catch (const UserError& mistake) {
      message = text("u", mistake.what());
    } catch (const std::filesystem::filesystem_error& refusal) {
      message = text("u", mistake_of(refusal).what());
    } catch (const std::exception& fault) {
      message = text("f", fault.what());
    } catch (...) {
      message = "fan exception of an unknown type";
    }
  }
  message = broadcast(message, static_cast<int>(lowest));
  const std::string what = (lowest > 0 ? text("rank ", lowest, ": ") : "") + message.substr(1);
  if (message[0] == 'u') throw UserError(what);
  throw CommonFault(rank() == lowest, what);
}

}  // namespace upcycle
