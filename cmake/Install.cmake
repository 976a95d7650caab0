# cmake --install build/cpu --prefix PREFIX: the program into bin, the scripts of tools/installed.txt, and what one reads in share/upcycle.
include(GNUInstallDirs)

# LibTorch, CUDA and MPI are found where they were at linking; the build tree's own paths go.
set_target_properties(upcycle PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
install(TARGETS upcycle RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY configs checkpoints-schema slurm DESTINATION ${CMAKE_INSTALL_DATADIR}/upcycle PATTERN site.sh EXCLUDE)

# The scripts start with the Python that has their packages, unless its path is none that a #! line can have.
file(STRINGS tools/installed.txt installed REGEX "^[a-z]")
foreach(line ${installed})
  string(REGEX MATCH "^[a-z-]+" tool "${line}")
  if(NOT EXISTS ${PROJECT_SOURCE_DIR}/tools/${tool})
    continue()
  endif()
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS tools/${tool})
  file(READ tools/${tool} text)
  if(UPCYCLE_PYTHON AND UPCYCLE_PYTHON MATCHES "^[^ ]+$")
    string(REGEX REPLACE "^#![^\n]*python3?\n" "#!${UPCYCLE_PYTHON}\n" text "${text}")
  endif()
  file(WRITE ${CMAKE_BINARY_DIR}/installed/${tool} "${text}")
  install(PROGRAMS ${CMAKE_BINARY_DIR}/installed/${tool} DESTINATION ${CMAKE_INSTALL_LIBEXECDIR}/upcycle)
  if(line MATCHES "[ \t]command")
    file(RELATIVE_PATH from_bin /${CMAKE_INSTALL_BINDIR} /${CMAKE_INSTALL_LIBEXECDIR}/upcycle/${tool})
    file(CREATE_LINK ${from_bin} ${CMAKE_BINARY_DIR}/installed/upcycle-${tool} SYMBOLIC)
    install(FILES ${CMAKE_BINARY_DIR}/installed/upcycle-${tool} DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
endforeach()
